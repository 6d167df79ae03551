"""The engine with keys and values in FP8 on a GPU: on whatever way, a token is as likely as rounding allows."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.engine import Engine
from deployments.engine.model.load import prepare_model
from deployments.messages import ChunkReady
from tests.engine.drafters import mixture, with_drafter
from tests.engine.driving import Transcript, greedy, prefill_all, run
from tests.engine.rounded import rounded_logits
from tests.gpu.driving import NUM_TOKENS, TIE, few_blocks, generate, generate_preempted, prompt
from tests.gpu.driving import build as build_engine
from tests.gpu.models import exact, plain

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def reference(family: str, *, is_exact: bool = False) -> PreTrainedModel:
    model = copy.deepcopy((exact if is_exact else plain)(family))
    prepare_model(model, "random", torch.device("cuda"))
    return model


def build(family: str, **overrides: object) -> Engine:
    return build_engine(family, kv_dtype="fp8", **overrides)


def logits_of(model: PreTrainedModel, tokens: dict[str, list[int]], *, rounds: bool = True) -> Tensor:
    """Of each token that was drawn, the logits that it was drawn from, (tokens, vocabulary)."""
    found = []
    for name, drawn in tokens.items():
        assert len(drawn) == NUM_TOKENS
        given = prompt(int(name[1:]))
        found.append(rounded_logits(model, (*given, *drawn), rounds=rounds)[len(given) - 1 : -1])
    return torch.cat(found)


def share_behind(logits: Tensor, chosen: Tensor) -> float:
    """How many tokens are further behind the likeliest than a tie, of all."""
    behind = logits.amax(-1) - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) > TIE
    return float(behind.float().mean())


def check(family: str, *answers: dict[str, list[int]]) -> None:
    """A key that differs in its last bit may be rounded to another code, so a few tokens may be behind.

    How many, that says bfloat16 itself: how often it alone misses the likeliest token of float32, both with rounded KV.
    All answers of a test count together: of a hundred tokens it misses none or five.
    """
    drawn = torch.tensor([token for tokens in answers for each in tokens.values() for token in each], device="cuda")

    def logits(*, is_exact: bool = False, rounds: bool = True) -> Tensor:
        return torch.cat([logits_of(reference(family, is_exact=is_exact), each, rounds=rounds) for each in answers])

    expected = logits(is_exact=True)
    behind, missed = share_behind(expected, drawn), share_behind(expected, logits().argmax(-1))
    without = share_behind(logits(rounds=False), drawn)
    print(f"{family}: {behind:.1%} of tokens behind, {missed:.1%} by bfloat16, {without:.1%} if nothing were rounded")
    assert behind <= 2 * missed + 0.02


@every_family
@pytest.mark.parametrize("budget", [4096, 300])
def test_prompts_of_all_lengths_together(family: str, budget: int) -> None:
    engine = build(family, max_num_batched_tokens=budget)
    check(family, generate(engine))
    assert engine.num_free_blocks == 64


@every_family
def test_preemption_and_a_warm_cache(family: str) -> None:
    check(family, *generate_preempted(build(family, num_blocks=few_blocks(family))))


@every_family
def test_drafts_are_verified_against_codes(family: str) -> None:
    answers = generate(build(family))
    engine = build(family, speculation={"method": "ngram", "max_drafts": 4})
    with_drafter(engine, lambda sequence: tuple(answers[sequence.request_id]), mixture)
    check(family, generate(engine))
    assert engine.stats().accepted_tokens.total > 0


def test_handed_over_prompts_continue_and_take_half_the_bytes() -> None:
    source, target, transcript = build("llama", max_num_batched_tokens=512), build("llama"), Transcript()
    for length in (120, 255, 256, 257, 400, 700, 1100, 1500):
        request = greedy(f"r{length}", prompt(length), NUM_TOKENS)
        target.add(request, remote_threshold=100)
        while target.stats().num_reserved == 0:  # not in a step in which another sequence outgrows its KV
            transcript.note(target.step())
        for chunk, tensor in prefill_all(source, request):
            assert isinstance(chunk, ChunkReady) and tensor.dtype is torch.uint8
            assert tensor.nbytes == chunk.num_blocks * 256 * 3 * 2 * 2 * (64 + 4)
            transcript.note(target.import_chunk(chunk, tensor))
    check("llama", run(target, transcript).tokens)


def test_twice_as_many_blocks_fit() -> None:
    num_bytes, numbers = 1 << 26, 256 * 3 * 2 * 2 * 64
    plain_blocks, blocks = (
        build_engine("llama", num_blocks=None, kv_cache_bytes=num_bytes, kv_dtype=kv_dtype).limits.num_blocks
        for kv_dtype in ("auto", "fp8")
    )
    assert (plain_blocks, blocks) == (num_bytes // (2 * numbers), num_bytes // (numbers * 68 // 64))
