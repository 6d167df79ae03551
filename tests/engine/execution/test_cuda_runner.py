"""What a GPU's runner lays out for its graphs, on a CPU: graphs run their steps anew, attention is plain torch.

Everything is in float32, so tokens must equal transformers' own, whichever graphs a step takes.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.faked_gpu import fake_gpu  # before what needs Triton

from deployments.engine.batch.arrays import StepArrays  # isort: skip
from deployments.engine.engine import Engine
from deployments.engine.execution.costs import StepCosts
from deployments.engine.execution.cuda import CudaRunner
from deployments.engine.execution.graphs import PromptGraph
from deployments.messages import GenerateRequest, SamplingParams
from tests.engine.drafters import lies, mixture, truth, with_drafter
from tests.engine.driving import Transcript, build_engine, greedy, run
from tests.engine.families import load, random_prompt, reference
from tests.engine.insides import forget_verification, replace_runner, runner_of, tell_of_replays, tell_of_verifications

NUM_TOKENS = 6


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Of each step of recorded parts: its decodes, and which graphs its prompts took."""
    seen: list[tuple[int, list[int]]] = []

    def note(arrays: StepArrays, graphs: list[PromptGraph]) -> None:
        seen.append((arrays.num_singles, [graph.length for graph in graphs]))

    tell_of_replays(monkeypatch, note)
    return seen


def build(family: str, **overrides: object) -> Engine:
    settings: dict[str, Any] = {"max_num_batched_tokens": 64, "max_model_len": 128, "max_num_seqs": 4} | overrides
    engine = build_engine(load(family), is_pipelined=True, **settings)
    replace_runner(engine, CudaRunner(load(family), runner_of(engine).cache, engine.limits))
    return engine


def generate(engine: Engine, prompts: dict[str, tuple[int, ...]], *, apart: int = 0) -> dict[str, list[int]]:
    """Tokens of all; each request comes so many steps after the one before."""
    transcript = Transcript()
    for name, prompt in prompts.items():
        engine.add(greedy(name, prompt, NUM_TOKENS))
        for _ in range(apart):
            transcript.note(engine.step())
    return run(engine, transcript).tokens


def check(family: str, prompts: dict[str, tuple[int, ...]], tokens: dict[str, list[int]]) -> None:
    for name, prompt in prompts.items():
        assert tuple(tokens[name]) == reference(family, prompt, NUM_TOKENS), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_behind_computed_tokens_are_replayed_beside_decodes(
    family: str, replayed: list[tuple[int, list[int]]]
) -> None:
    engine = build(family)
    prompts = {f"r{length}": random_prompt(length, seed=length) for length in (3, 40, 21)}
    check(family, prompts, generate(engine, prompts))
    replayed.clear()
    check(family, prompts, generate(engine, prompts, apart=1))  # all but their ends are cached
    assert (1, [16]) in replayed and (2, [16]) in replayed, replayed


@pytest.mark.parametrize(("family", "num_blocks"), [("mistral_windowed", 8), ("gemma2", 36), ("gpt_oss", 28)])
@pytest.mark.parametrize("budget", [16, 64])
def test_blocks_that_a_sequence_has_passed_are_named_by_no_graph(family: str, num_blocks: int, budget: int) -> None:
    engine = build(family, max_num_batched_tokens=budget, num_blocks=num_blocks)
    prompts = {f"r{length}": random_prompt(length, seed=length) for length in (100, 40, 21)}
    check(family, prompts, generate(engine, prompts, apart=1))


def test_a_prompt_in_several_chunks_takes_graphs_for_all_of_them(replayed: list[tuple[int, list[int]]]) -> None:
    engine = build("llama", max_num_batched_tokens=20)
    prompts = {"short": random_prompt(5), "long": random_prompt(50, seed=1)}
    check("llama", prompts, generate(engine, prompts, apart=2))
    # 20 tokens a step, one of them for the decode: the beginning of a prompt, its middle, its end.
    assert [lengths for decodes, lengths in replayed if decodes] == [[32], [32], [16]], replayed


def test_steps_that_take_longer_as_parts_are_launched_as_a_whole(
    replayed: list[tuple[int, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCosts, "parts_ms", lambda *_: 1e9)
    engine = build("llama")
    prompts = {f"r{length}": random_prompt(length, seed=length) for length in (3, 40, 21)}
    for _ in range(2):
        check("llama", prompts, generate(engine, prompts, apart=1))
    assert not any(decodes for decodes, _ in replayed), "only what is alone in its step"


def test_drawn_tokens_are_those_of_a_step_launched_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for parts_ms in (0.0, 1e9):
        monkeypatch.setattr(StepCosts, "parts_ms", lambda *_, ms=parts_ms: ms)
        engine, transcript = build("llama"), Transcript()
        for number, length in enumerate((3, 40, 21)):
            request = greedy(f"r{number}", random_prompt(length, seed=length), NUM_TOKENS)
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.9, top_k=9, seed=number)
            engine.add(type(request)(request.request_id, request.prompt_token_ids, sampling))
            transcript.note(engine.step())
        answers.append(dict(run(engine, transcript).tokens))
    assert answers[0] == answers[1]


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], tuple[int, int]]]:
    """Of each step with drafts that a graph held: tokens of its sequences, and the graph's room."""
    seen: list[tuple[list[int], tuple[int, int]]] = []
    tell_of_verifications(monkeypatch, lambda arrays, size: seen.append((arrays.counts.tolist(), size)))
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("lies", [truth, lies, mixture])
def test_drafts_are_verified_by_the_graph_that_just_holds_them(
    family: str, lies: Callable[[int], bool], verified: list[tuple[list[int], tuple[int, int]]]
) -> None:
    prompts = {f"r{length}": random_prompt(length, seed=length) for length in (3, 40, 21)}
    answers = {name: reference(family, prompt, NUM_TOKENS) for name, prompt in prompts.items()}
    engine = with_drafter(
        build(family, speculation={"method": "ngram", "max_drafts": 4}), lambda s: answers[s.request_id], lies
    )
    check(family, prompts, generate(engine, prompts))
    check(family, prompts, generate(engine, prompts, apart=1))
    assert engine.stats().drafted_tokens.total
    assert ([5, 5, 5], (4, 16)) in verified, verified
    assert any(size[1] > sum(counts) for counts, size in verified), "some rooms are larger than what is in them"


def test_a_sequence_without_drafts_is_verified_beside_others(
    verified: list[tuple[list[int], tuple[int, int]]],
) -> None:
    prompts = {f"r{length}": random_prompt(length, seed=length) for length in (3, 40, 21)}
    answers = {name: reference("llama", prompt, NUM_TOKENS) for name, prompt in prompts.items()} | {"r40": ()}
    engine = with_drafter(build("llama", speculation={"method": "ngram"}), lambda s: answers[s.request_id], truth)
    check("llama", prompts, generate(engine, prompts))
    assert ([1, 5, 5], (4, 16)) in verified, verified


def test_what_no_graph_holds_is_launched_as_a_whole(verified: list[tuple[list[int], tuple[int, int]]]) -> None:
    prompts = {f"r{length}": random_prompt(length, seed=length) for length in (3, 40, 21)}
    answers = {name: reference("llama", prompt, NUM_TOKENS) for name, prompt in prompts.items()}
    engine = build("llama", speculation={"method": "ngram", "max_drafts": 2})
    with_drafter(engine, lambda s: answers[s.request_id], truth)
    forget_verification(engine)
    check("llama", prompts, generate(engine, prompts))
    assert engine.stats().accepted_tokens.total and not verified


def test_drawn_tokens_are_those_without_drafts(verified: list[tuple[list[int], tuple[int, int]]]) -> None:
    def draw(engine: Engine) -> dict[str, list[int]]:
        for number, length in enumerate((3, 40, 21)):
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.9, top_k=9, seed=number, num_logprobs=1)
            engine.add(GenerateRequest(f"r{number}", random_prompt(length, seed=length), sampling))
        return run(engine).tokens

    answers = draw(build("llama"))
    engine = build("llama", speculation={"method": "ngram"})
    assert draw(with_drafter(engine, lambda s: tuple(answers[s.request_id]), mixture)) == answers
    assert verified
