"""The largest steps that an engine's limits allow, run for real before it takes requests: memory cannot run out later.

Called when an engine starts on a GPU: to measure what steps take beside the KV pool, and to try them once more beside
the pool of the size that was found. What the steps read and write is the pool's, whatever lies in it. Small steps of
odd sizes run as well, for which kernels would be compiled, or loaded, while requests wait.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch

from deployments.engine.config import EngineLimits
from deployments.engine.execution.base import Runner
from deployments.engine.execution.heads import HeadRunner, KnownTokens, NewestTokens
from deployments.engine.execution.portable import build_runner
from deployments.engine.execution.portable_heads import build_head_runner
from deployments.engine.execution.rehearsed import (
    SAMPLING,
    RehearsedSequences,
    build_rehearsed_sequences,
    rehearsed_mask,
)
from deployments.engine.kv.cache import KVCache
from deployments.engine.model.eagle3 import Eagle3Head
from deployments.engine.model.load import LoadedModel
from deployments.engine.sampling.guessing import GuessDraws
from deployments.engine.sampling.sampler import SamplingPreparation
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.scheduler import MAX_SCORED_TOKENS, MAX_VERIFIED_TOKENS
from deployments.errors import LimitsError
from deployments.messages import MAX_LOGPROBS

# Runs steps of a runner, within limits, for a vocabulary of some tokens.
Rehearsal: TypeAlias = Callable[[Runner, EngineLimits, int], None]

# Of a prompt whose tokens' logprobs are wanted, with which a step is never a recorded one.
_SCORED_TOKENS = 3
# Draws of small steps, tokens of their prompts, and chunks behind a block: kernels are compiled for powers of two, and
# once more for multiples of 16.
_FEW_DRAWS = (1, 3, 4, 10, 17, 33, 65, 129, 257)
_SHORT_PROMPTS = (37, 65, 129, 257, 513, 1025, 2049, 4097)
_FEW_CHUNKS = (1, 2, 4, 8, 16, 32)


def drafter_limits(limits: EngineLimits, drafter: LoadedModel) -> EngineLimits:
    """Bounds of the model that guesses for an engine of these bounds.

    Its steps hold everybody's next token up, so one computes few tokens of a prompt that it does not know yet.
    """
    return replace(
        limits,
        max_model_len=min(limits.max_model_len, drafter.max_model_len),
        max_num_batched_tokens=max(2 * limits.max_num_seqs, limits.max_num_batched_tokens // 4),
        max_drafts=0,
        handoff_layer_parts=1,
    )


def build_rehearsed(loaded: LoadedModel, limits: EngineLimits) -> Runner:
    """A runner with its pool; on a GPU the largest steps have run beside it, and small ones.

    Raises:
        LimitsError: they do not fit.
    """
    return _build(loaded, limits, (rehearse, rehearse_small))


def _build(loaded: LoadedModel, limits: EngineLimits, rehearsals: tuple[Rehearsal, ...]) -> Runner:
    """What is rehearsed runs on a GPU alone."""
    cache = None
    try:
        cache = KVCache(loaded.kv_shape, limits.num_blocks, limits.block_size, loaded.device)
        runner = build_runner(loaded, cache, limits)
        for run in rehearsals if loaded.device.type == "cuda" else ():
            run(runner, limits, loaded.vocab_size)
    except torch.OutOfMemoryError as error:
        what = "a KV pool" if cache is None else "the largest steps beside the model and a KV pool"
        raise LimitsError(_too_large(what, loaded, limits, error)) from None
    return runner


def build_rehearsed_head(loaded: LoadedModel, limits: EngineLimits) -> HeadRunner:
    """The same of a model's head.

    Raises:
        LimitsError: its KV or its steps do not fit.
    """
    assert loaded.head is not None
    try:
        runner = build_head_runner(loaded, limits)
        if loaded.device.type == "cuda":
            rehearse_head(runner, loaded.head, limits)
    except torch.OutOfMemoryError as error:
        what = "a head with its steps, beside the model and a KV pool"
        raise LimitsError(_too_large(what, loaded, limits, error)) from None
    return runner


def _too_large(what: str, loaded: LoadedModel, limits: EngineLimits, error: torch.OutOfMemoryError) -> str:
    pool = limits.num_blocks * loaded.kv_shape.bytes_of_pool_block(limits.block_size) / 2**30
    return (
        f"{what} of {limits.num_blocks} blocks ({pool:.2f} GiB) does not fit into the GPU's memory: lower"
        f" {name_limits(limits)} or the pool's size. {str(error).split(' If reserved')[0]}"
    )


def free_beside_largest_steps(loaded: LoadedModel, limits: EngineLimits) -> int:
    """Bytes of the GPU's memory that are left while the largest steps run beside a pool of `limits.num_blocks`.

    Raises:
        LimitsError: not even that fits.
    """
    _give_back()
    runners = [_build(loaded, limits, (rehearse,))]
    if loaded.drafter is not None:
        runners.append(_build(loaded.drafter, drafter_limits(limits, loaded.drafter), (rehearse,)))
    head = build_rehearsed_head(loaded, limits) if loaded.head is not None and limits.max_drafts else None
    torch.cuda.synchronize(loaded.device)
    # What steps took stays with torch's allocator: what is free now is what nobody ever took.
    free, _ = torch.cuda.mem_get_info(loaded.device)
    del runners, head
    _give_back()
    return int(free)


def name_limits(limits: EngineLimits) -> str:
    """Those that decide what the largest steps take."""
    names = "max_num_batched_tokens", "max_num_seqs", "max_model_len"
    return ", ".join(f"{name} ({getattr(limits, name)})" for name in names)


def _give_back() -> None:
    """Free what nobody refers to."""
    gc.collect()
    torch.cuda.empty_cache()


def rehearse(runner: Runner, limits: EngineLimits, vocab_size: int) -> None:
    """Run every kind of step that may be the one that takes the most.

    Args:
        runner: of the engine; its pool need not hold what the steps would take, blocks are used again and again.
        limits: of the engine.
        vocab_size: of the model.

    Raises:
        torch.OutOfMemoryError: one of them does not fit.
    """
    sequences = build_rehearsed_sequences(runner, limits, vocab_size)
    for step in worst_steps(limits):
        _run(runner, _scheduled(sequences, step))
    # The first chunk of a prompt draws nothing.
    prompt = sequences.sequence(0, 0, limits.max_model_len)
    chunk = min(limits.max_num_batched_tokens, limits.max_model_len - 1)
    _run(runner, [ScheduledSequence.of(prompt, chunk)])
    # As many logits as one step may want.
    longest = limits.max_model_len
    decodes = [sequences.sequence(number, longest - 1, longest) for number in range(limits.max_num_seqs - 1)]
    room = min(MAX_SCORED_TOKENS, limits.max_num_batched_tokens - len(decodes), longest - 1)
    items = [ScheduledSequence.of(sequence, 1) for sequence in decodes]
    scored = sequences.sequence(len(decodes), 0, room + 1, num_prompt_logprobs=MAX_LOGPROBS)
    _run(runner, [*items, ScheduledSequence.of(scored, room)])
    if drafts := most_drafts(limits):
        items = [
            ScheduledSequence.decode(
                sequences.sequence(number, longest - count - 1, longest - count, count), (0,) * count
            )
            for number, count in enumerate(drafts)
        ]
        _run(runner, items)


def rehearse_small(runner: Runner, limits: EngineLimits, vocab_size: int) -> None:
    """Run small steps that are launched as a whole; arguments as those of `rehearse`."""
    sequences = build_rehearsed_sequences(runner, limits, vocab_size)
    for step in small_steps(limits):
        scored = sequences.sequence(len(step), 0, _SCORED_TOKENS + 1, num_prompt_logprobs=MAX_LOGPROBS)
        _run(runner, [*_scheduled(sequences, step), ScheduledSequence.of(scored, _SCORED_TOKENS)])


def _scheduled(sequences: RehearsedSequences, step: list[tuple[int, int]]) -> list[ScheduledSequence]:
    return [
        ScheduledSequence.of(sequences.sequence(number, start, start + count), count)
        for number, (start, count) in enumerate(step)
    ]


def _run(runner: Runner, items: list[ScheduledSequence]) -> None:
    """A step. Of several that draw one has no grammar: then logits are copied once more than if all had."""
    if sum(item.num_draws > 0 for item in items) > 1:
        items[0].sequence.release(mask=None)
    runner.launch(items).collect()


def rehearse_head(runner: HeadRunner, head: Eagle3Head, limits: EngineLimits) -> None:
    """Have a head compute the KV of as many tokens as a step may have, and guess for as many sequences.

    Args:
        runner: of the head.
        head: it.
        limits: of the engine.

    Raises:
        torch.OutOfMemoryError: that does not fit.
    """
    num_tokens, num_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
    weight, nothing = head.norm.weight, np.zeros(num_tokens, np.int64)
    # Of the last step, of the one that has just ended, and of the one in flight.
    states = [weight.new_zeros(num_tokens, head.hidden_size) for _ in range(3)]
    runner.learn(states[0], KnownTokens(nothing, nothing, nothing, nothing))
    longest, num_blocks = limits.max_model_len, -(-limits.max_model_len // limits.block_size)
    zeros, ones = nothing[:num_seqs], np.ones(num_seqs, np.int64)
    tables = np.zeros((num_seqs, num_blocks), np.int64)
    mask = rehearsed_mask(head.vocab_size)
    masks = [mask, *[None] * (num_seqs > 1), *[mask] * (num_seqs - 2)]  # see `_run`
    draws = GuessDraws(SamplingPreparation(), [SAMPLING] * num_seqs, zeros + longest, masks)
    runner.guess(states[0], NewestTokens(zeros, zeros, zeros + longest - 1, zeros, tables, ones), draws)


def worst_steps(limits: EngineLimits) -> list[list[tuple[int, int]]]:
    """(computed before, new) tokens of the sequences of each step; all of them draw a token."""
    longest, budget, num_seqs = limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs
    decode = (longest - 1, 1)
    alone, beside, share = (min(most, longest) for most in (budget, budget - num_seqs + 1, budget // num_seqs))
    steps = [
        [decode] * num_seqs,
        [(0, alone)],
        [(longest - alone, alone)],
        [decode] * (num_seqs - 1) + [(longest - beside, beside)],
        # As many tokens as there may be, of whole prompts and of chunks with the longest context.
        [(0, count) for count in _fill(budget, longest, num_seqs)],
        [(longest - count, count) for count in _fill(budget, longest, num_seqs)],
        [(0, share)] * num_seqs,
        [(longest - share, share)] * num_seqs,
    ]
    return list({tuple(step): step for step in steps if step}.values())


def small_steps(limits: EngineLimits) -> list[list[tuple[int, int]]]:
    """As `worst_steps`, of small ones that leave room for a prompt of `_SCORED_TOKENS` more."""
    block, decode = limits.block_size, (limits.block_size // 2, 1)
    steps = [
        *([decode] * count for count in _FEW_DRAWS),
        *([(0, count)] for count in _SHORT_PROMPTS),
        *([(block, 35)] * count for count in _FEW_CHUNKS),
        *([decode] * 3 + prompts for prompts in ([(0, 101), (0, 37)], [(block, 35)], [(block, 5), (block, 35)])),
        [(block, 5)],
        [(block, 701)],
    ]
    most = limits.max_num_batched_tokens - _SCORED_TOKENS
    fitting = [step for step in steps if len(step) < limits.max_num_seqs and sum(new for _, new in step) <= most]
    return [
        step
        for step in fitting
        if max(_SCORED_TOKENS + 1, *(start + count for start, count in step)) <= limits.max_model_len
    ]


def most_drafts(limits: EngineLimits) -> list[int]:
    """Drafts of each sequence in a step that tries as many as it may; none of an engine that guesses nothing."""
    room = min(limits.max_num_batched_tokens, MAX_VERIFIED_TOKENS)
    most = min(limits.max_drafts, limits.max_model_len - 1)
    return [count - 1 for count in _fill(room, 1 + most, limits.max_num_seqs)] if most else []


def _fill(budget: int, longest: int, num_seqs: int) -> list[int]:
    """Tokens of as few sequences as use up a budget."""
    counts: list[int] = []
    while budget and len(counts) < num_seqs:
        counts.append(min(budget, longest))
        budget -= counts[-1]
    return counts
