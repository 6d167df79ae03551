"""Drafts are verified on a GPU by graphs, and change no token but where two are tied."""

from collections.abc import Callable

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.batch.arrays import StepArrays  # noqa: E402
from deployments.engine.config import EngineConfig  # noqa: E402
from deployments.engine.engine import Engine  # noqa: E402
from deployments.engine.scheduling.sequence import Sequence  # noqa: E402
from deployments.messages import GenerateRequest, SamplingParams  # noqa: E402
from tests.engine.drafters import lies, mixture, truth, with_drafter  # noqa: E402
from tests.engine.driving import greedy, run  # noqa: E402
from tests.engine.insides import runner_of, tell_of_verifications  # noqa: E402
from tests.gpu.driving import LENGTHS, NUM_TOKENS, build, check_greedy, generate, generate_preempted, prompt  # noqa: E402
from tests.gpu.models import CONFIGS, loaded  # noqa: E402

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
SPECULATION = {"method": "ngram", "max_drafts": 4}
Verified = list[tuple[list[int], tuple[int, int]]]


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Verified:
    """Of each step with drafts that a graph held: tokens of its sequences, and the graph's room."""
    seen: Verified = []
    tell_of_verifications(monkeypatch, lambda arrays, size: seen.append((arrays.counts.tolist(), size)))
    return seen


def knowing(family: str, lies: Callable[[int], bool], **overrides: object) -> Engine:
    """An engine whose drafter knows what it says without drafts, also behind a tie in which it said something else."""
    plain = build(family, **overrides)
    answers = generate(plain)

    def answer(sequence: Sequence) -> tuple[int, ...]:
        name, given = sequence.request_id, tuple(sequence.token_ids)
        said = list(given[len(sequence.request.prompt_token_ids) :])
        if answers[name][: len(said)] != said:
            plain.add(greedy(f"{name}-{len(said)}", given, NUM_TOKENS - len(said)))
            (rest,) = run(plain).tokens.values()
            answers[name] = said + rest
        return tuple(answers[name])

    return with_drafter(build(family, speculation=SPECULATION, **overrides), answer, lies)


@every_family
@pytest.mark.parametrize("lies", [truth, lies, mixture])
def test_greedy_tokens_are_the_likeliest_whatever_is_guessed(
    family: str, lies: Callable[[int], bool], verified: Verified
) -> None:
    engine = knowing(family, lies)
    for name, tokens in generate(engine).items():
        assert len(tokens) == NUM_TOKENS
        check_greedy(family, prompt(int(name[1:])), tokens)
    assert verified and max(max(counts) for counts, _ in verified) == 5
    stats = engine.stats()
    if lies is truth:  # but for ties
        num_right, num_drafted = stats.accepted_tokens.total, stats.drafted_tokens.total
        assert num_right > 0.5 * num_drafted, f"{num_right} of {num_drafted} drafts were right"
    assert engine.num_free_blocks == 64


def test_no_step_with_drafts_is_launched_as_a_whole(verified: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = knowing("llama", mixture)
    generate(engine, LENGTHS[2:4])
    verified.clear()
    launch = runner_of(engine)._run_eagerly

    def fail_on_drafts(arrays: StepArrays, *others: object) -> object:
        assert len(arrays.draw_rows) <= arrays.num_runs, "drafts"
        return launch(arrays, *others)

    monkeypatch.setattr(runner_of(engine), "_run_eagerly", fail_on_drafts)
    generate(engine)
    assert verified


def test_lookups_and_preemption() -> None:
    for found in generate_preempted(build("llama", num_blocks=9, speculation=SPECULATION)):
        for name, tokens in found.items():
            check_greedy("llama", prompt(int(name[1:])), tokens)


def test_drawn_tokens_repeat_with_and_without_drafts(verified: Verified) -> None:
    """In float32 the same; here nearly always: a draw compares rounded numbers too."""

    def draw(engine: Engine) -> list[list[int]]:
        for number, length in enumerate(LENGTHS):
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.95, seed=number)
            engine.add(GenerateRequest(f"r{number}", prompt(length), sampling))
        tokens = run(engine).tokens
        return [tokens[f"r{number}"] for number in range(len(LENGTHS))]

    answers = draw(build("llama"))
    engine = build("llama", speculation=SPECULATION)
    with_drafter(engine, lambda sequence: tuple(answers[int(sequence.request_id[1:])]), mixture)
    same = sum(a == b for a, b in zip(draw(engine), answers, strict=True))
    assert verified and same >= len(answers) // 2, f"{same} of {len(answers)} answers are the same"


@pytest.mark.usefixtures("small_card")
def test_an_engine_that_takes_what_is_left_has_room_for_as_many_drafts_as_may_be() -> None:
    config = EngineConfig.model_validate(
        {"max_num_seqs": 100, "max_num_batched_tokens": 4096, "speculation": SPECULATION}
    )
    engine = Engine(loaded("llama"), config)
    with_drafter(engine, lambda sequence: (5,) * 64, truth)
    for number in range(100):
        sampling = SamplingParams(max_tokens=64, temperature=1.0, top_k=50, top_p=0.9, seed=number)
        engine.add(GenerateRequest(f"r{number}", prompt(40), sampling))
    assert all(len(tokens) == 64 for tokens in run(engine).tokens.values())
    assert engine.stats().drafted_tokens.total
