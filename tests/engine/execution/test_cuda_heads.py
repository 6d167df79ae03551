"""What a GPU's graphs hand out for a head and its own graphs, on a CPU: they run their steps anew, attention is plain.

Everything is in float32, so guesses must equal those of the head by itself, whichever graphs a step takes.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.faked_gpu import fake_gpu  # before what needs Triton

from deployments.engine.engine import Engine  # isort: skip
from deployments.engine.execution import cuda_heads
from deployments.engine.execution.base import LaunchedStep
from deployments.engine.execution.costs import StepCosts
from deployments.engine.execution.cuda import CudaRunner
from deployments.engine.execution.cuda_heads import CudaHead
from deployments.engine.execution.rehearsal import rehearse, rehearse_head
from deployments.engine.model.load import LoadedModel
from deployments.messages import GenerateRequest, SamplingParams
from tests.engine.drafters import lies, mixture, truth
from tests.engine.driving import Transcript, build_engine, generate, hand_over_all, run
from tests.engine.families import CPU, VOCAB_SIZE, random_prompt
from tests.engine.grammars import END, load_with_tokenizer, regex
from tests.engine.guessing_heads import Helped, alone, guessing, helped, in_groups, plain, requests, with_head
from tests.engine.insides import (
    head_runner_of,
    replace_head_runner,
    replace_runner,
    runner_of,
    tell_of_replays,
    tell_of_verifications,
)

each = pytest.mark.parametrize("when", [truth, lies, mixture])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)


def build(loaded: LoadedModel | None = None, *, head_seqs: int | None = None, **overrides: Any) -> Engine:
    loaded = loaded or with_head()
    loaded = replace(loaded, head=copy.deepcopy(loaded.head))
    assert loaded.head is not None
    settings = {"max_model_len": 256, "max_num_batched_tokens": 64} | overrides
    engine = guessing(loaded, is_pipelined=True, **settings)
    replace_runner(engine, CudaRunner(loaded, runner_of(engine).cache, engine.limits))
    limits = replace(engine.limits, max_num_seqs=head_seqs or engine.limits.max_num_seqs)
    replace_head_runner(engine, CudaHead(loaded.head, limits, CPU))
    return engine


@each
def test_guesses_are_those_of_the_head_and_no_answer_changes(when: Callable[[int], bool]) -> None:
    engine = build()
    helper = helped(engine, when)
    assert generate(engine, requests()) == plain()
    helper.check()
    stats = engine.stats()
    assert stats.drafted_tokens.total and bool(stats.accepted_tokens.total) == (when is not lies)


@pytest.mark.parametrize("parts_ms", [0.0, 1e9], ids=["recorded parts", "launched as a whole"])
def test_states_come_from_every_kind_of_step(parts_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, beside decodes; drafts; single tokens."""
    monkeypatch.setattr(StepCosts, "parts_ms", lambda *_: parts_ms)
    replayed: list[tuple[int, int]] = []
    verified: list[int] = []
    tell_of_replays(monkeypatch, lambda arrays, graphs: replayed.append((arrays.num_singles, len(graphs))))
    tell_of_verifications(monkeypatch, lambda arrays, size: verified.append(arrays.num_tokens))
    engine, transcript = build(max_num_batched_tokens=24), Transcript()
    helper = helped(engine, mixture)
    for request in requests():
        engine.add(request)
        for _ in range(4):
            transcript.note(engine.step())
    run(engine, transcript)
    assert [tuple(transcript.tokens[request.request_id]) for request in requests()] == plain()
    helper.check()
    assert verified and any(singles and prompts for singles, prompts in replayed) == (parts_ms == 0.0)


def test_tokens_that_no_graph_holds_are_launched_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_heads, "_KNOWN", (1, 2, 4))
    engine = build()
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    helper.check()


def test_drawn_guesses_are_those_of_the_portable_runner() -> None:
    found = []
    for engine in (guessing(), build()):
        helper = helped(engine, mixture)
        assert generate(engine, requests()) == plain()
        found.append({(name, len(known)): tokens for name, _, known, tokens in helper.guessed})
    common = found[0].keys() & found[1].keys()
    assert {name for name, _ in common} == {request.request_id for request in requests()}
    assert all(found[0][key] == found[1][key] for key in common)


def test_first_guesses_go_by_grammars() -> None:
    grammar = regex(r"[a-c]{1,3}(-[0-9]{2,4}){2,6}")
    drawn = SamplingParams(64, stop_token_ids=(END,), grammar=grammar)
    asked = [GenerateRequest(f"g{seed}", random_prompt(21, seed=5), replace(drawn, seed=seed)) for seed in range(4)]
    loaded = replace(with_head(), path=load_with_tokenizer("llama").path)
    expected = generate(build_engine(replace(loaded, head=None)), asked)
    engine = build(loaded)
    helper = Helped(engine, {}, truth)
    helper._help = lambda sequence, count: helper.guessed[-1][3]  # type: ignore[method-assign]
    assert generate(engine, asked) == expected
    assert engine.stats().drafted_tokens.total and helper.guessed


def test_behind_a_hand_off_and_for_lost_blocks_guesses_are_as_good() -> None:
    decode = build(enable_prefix_caching=False)
    helper = helped(decode, mixture)
    assert hand_over_all(build_engine(alone()), decode, requests()) == plain()
    for name, first in (("r0", 13), ("r3", 90), ("r6", 24)):
        assert {begin for other, begin, _, _ in helper.guessed if other == name} == {first}
    engine = build(num_blocks=25, max_num_seqs=3, max_num_batched_tokens=24, enable_prefix_caching=False)
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    assert engine.stats().preemptions > 0
    helper.check()


def test_guesses_are_as_good_where_groups_of_layers_have_blocks_of_their_own() -> None:
    engine = build(in_groups(), num_blocks=40, max_num_seqs=3, max_num_batched_tokens=24)
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    assert engine.stats().preemptions > 0
    helper.check()


def test_sequences_behind_those_that_graphs_hold_are_not_guessed_for() -> None:
    engine = build(head_seqs=2)
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    assert any(tokens for _, _, _, tokens in helper.guessed) and any(not tokens for _, _, _, tokens in helper.guessed)


def test_the_largest_steps_run() -> None:
    engine = build()
    rehearse(runner_of(engine), engine.limits, VOCAB_SIZE)
    runner = head_runner_of(engine)
    rehearse_head(runner, runner._head, engine.limits)
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    helper.check()


def test_an_engine_without_a_head_is_handed_no_states() -> None:
    engine = build_engine(alone(), is_pipelined=True, max_model_len=256, max_num_batched_tokens=64)
    runner = CudaRunner(alone(), runner_of(engine).cache, engine.limits)
    replace_runner(engine, runner)
    launch, launched = runner.launch, []

    def keep(*args: Any) -> LaunchedStep:
        launched.append(launch(*args))
        return launched[-1]

    runner.launch = keep  # type: ignore[assignment,method-assign]
    assert generate(engine, requests()[3:4]) == plain()[3:4]
    assert launched and all(step.states is None for step in launched)
