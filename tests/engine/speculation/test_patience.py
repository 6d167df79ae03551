"""A pipelined engine waits for tokens where that leads to drafts, and its answers are the same."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from deployments.engine.config import SpeculationConfig
from deployments.engine.engine import Engine
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.speculation.lookup import LookupDrafter
from deployments.engine.speculation.patience import Patience
from deployments.engine.speculation.speculator import Speculator
from deployments.messages import DrawnToken, EngineEvent, GenerateRequest, SamplingParams, TokenOutput
from tests.engine.drafters import lies, mixture, truth, with_drafter
from tests.engine.driving import Transcript, build_engine, generate, greedy, run
from tests.engine.families import load, random_prompt
from tests.engine.insides import is_in_flight, knows_plain_steps

NUM_TOKENS = 24
PROMPTS = tuple(random_prompt(length, seed=length) for length in (1, 5, 8, 23, 40))


def decode(*drafts: int) -> ScheduledSequence:
    request = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=9))
    return ScheduledSequence.decode(Sequence(request, Role.LOCAL, 0.0), drafts)


def test_each_wait_in_vain_makes_the_pause_longer_up_to_a_bound() -> None:
    patience = Patience()
    waits = [patience.waits_for([decode(), decode()]) for _ in range(60)]
    assert [step for step, is_wait in enumerate(waits) if is_wait] == [0, 2, 6, 14, 30, 46]


@pytest.mark.parametrize(("cost", "steps"), [(0.0, 16), (0.02, 16), (0.1, 51), (0.3, 151)])
def test_pauses_are_as_long_as_waits_are_dear(cost: float, steps: int) -> None:
    waits = waits_in_vain(Patience(), cost, 3000)
    assert waits[-1] - waits[-2] == steps


@pytest.mark.parametrize("cost", [0.02, 0.1, 0.3])
def test_waits_in_vain_take_next_to_nothing(cost: float) -> None:
    assert cost * len(waits_in_vain(Patience(), cost, 3000)) <= 1.0 + 0.002 * 3000 + cost


def waits_in_vain(patience: Patience, cost: float, num_steps: int) -> list[int]:
    """Before which of these steps it waited."""
    waits = []
    for step in range(num_steps):
        if patience.waits_for([decode(), decode()]):
            waits.append(step)
            patience.note_vain(cost)
        else:
            patience.note_plain()
    return waits


def test_who_has_lost_more_than_may_be_lost_tries_nothing_for_a_while() -> None:
    patience = Patience()
    for _ in range(30):
        patience.note_drafts(-0.05)
    assert patience.is_overdrawn and not patience.waits_for([decode()])
    num_steps = 0
    while patience.is_overdrawn:
        patience.note_plain()
        num_steps += 1
    assert 100 <= num_steps <= 130 and patience.waits_for([decode()])


def test_who_is_overdrawn_waits_for_nothing_so_what_does_not_overlap_then_was_no_wait_in_vain() -> None:
    patience = Patience()
    for _ in range(30):
        patience.note_drafts(-0.05)
    num_open = 0
    for _ in range(200):  # one short answer after the other: each has a first step that overlaps with none
        patience.note_vain(0.1)
        patience.note_plain()
        num_open += not patience.is_overdrawn
    assert num_open > 0


def test_a_step_behind_a_prompt_was_not_waited_for_in_vain_and_times_that_are_none_teach_nothing() -> None:
    stats = build_engine(load("llama")).stats()
    speculator = Speculator(LookupDrafter(), SpeculationConfig(method="ngram"), stats)
    sequence = Sequence(GenerateRequest("p", (1, 2), SamplingParams(max_tokens=9)), Role.LOCAL, 0.0)

    def end(run: ScheduledSequence, seconds: float, *, is_late: bool) -> None:
        speculator.note_end([(run, (DrawnToken(1),))], None, seconds, is_late=is_late)
        speculator.learn()

    for seconds in [0.01] * 9 + [0.0, math.nan]:
        end(decode(), seconds, is_late=False)
    for _ in range(100):
        end(ScheduledSequence.of(sequence, 2), 0.05, is_late=True)
        end(decode(), 0.02, is_late=True)
    assert speculator.waits_for([decode()])
    for _ in range(9):
        end(decode(), 0.02, is_late=True)
    assert not any(speculator.waits_for([decode()]) for _ in range(20))


def test_one_step_that_was_held_up_is_not_the_end_of_it() -> None:
    patience = Patience()
    for won in (0.4, 0.6, -20.0, 0.3):
        patience.note_drafts(won)
    assert not patience.is_overdrawn


def test_a_step_with_drafts_is_waited_for_always_and_so_is_the_next_one() -> None:
    patience = Patience()
    for _ in range(20):
        patience.waits_for([decode()])
    assert patience.waits_for([decode(), decode(7)]) and patience.waits_for([decode(3)])
    assert patience.waits_for([decode()]) and not patience.waits_for([decode()])


def test_parts_of_prompts_are_not_waited_for_but_their_ends_are() -> None:
    sequence = Sequence(GenerateRequest("p", (1, 2), SamplingParams(max_tokens=9)), Role.LOCAL, 0.0)
    patience = Patience()
    assert not patience.waits_for([decode(), ScheduledSequence.of(sequence, 1)])
    assert patience.waits_for([decode(), ScheduledSequence.of(sequence, 2)]), "and it is as patient as before"


@pytest.mark.parametrize("is_late", [False, True])
def test_what_a_wait_in_vain_takes_is_not_what_steps_without_drafts_take(is_late: bool) -> None:
    stats = build_engine(load("llama")).stats()
    speculator = Speculator(LookupDrafter(), SpeculationConfig(method="ngram"), stats)
    for _ in range(9):
        speculator.note_end([(decode(), (DrawnToken(1),))], None, 0.01, is_late=is_late)
        speculator.learn()
    assert knows_plain_steps(speculator, 1) is not is_late


def test_the_next_step_is_launched_before_anything_is_told_of_one_with_drafts() -> None:
    (request,) = greedy_requests()[-1:]
    answers = dict(zip(PROMPTS, generate(build_engine(load("llama")), greedy_requests()), strict=True))
    engine = build(lambda sequence: answers[sequence.request.prompt_token_ids], truth)
    engine.add(request)
    while not engine.stats().drafted_tokens.total:
        engine.step()
    assert engine.begin_step() == []
    told = [event for event in engine.finish_step() if isinstance(event, TokenOutput)]
    assert is_in_flight(engine) and len(told[0].token_ids) > 1


def test_an_engine_is_gone_with_its_last_reader() -> None:
    engine = build(lambda sequence: (1,) * NUM_TOKENS, lies)
    generate(engine, greedy_requests())
    gc.collect()
    gc.disable()  # it may come while graphs of another one are recorded, and must not reset those of this one then
    try:
        reader = weakref.ref(engine)
        del engine
        assert reader() is None
    finally:
        gc.enable()


def build(answer: Callable[[Sequence], tuple[int, ...]], lies: Callable[[int], bool], **overrides: Any) -> Engine:
    engine = build_engine(load("llama"), is_pipelined=True, speculation={"method": "ngram"}, **overrides)
    return with_drafter(engine, answer, lies)


def requests() -> list[GenerateRequest]:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=2, stop_token_ids=(3,))
    drawn = [GenerateRequest(f"d{number}", prompt, sampling) for number, prompt in enumerate(PROMPTS)]
    return [*drawn, *(greedy(f"g{number}", prompt, NUM_TOKENS) for number, prompt in enumerate(PROMPTS))]


@pytest.mark.parametrize("lies", [truth, lies, mixture])
@pytest.mark.parametrize("overrides", [{}, {"num_blocks": 19, "enable_prefix_caching": False}], ids=["", "tight"])
def test_answers_are_the_same(lies: Callable[[int], bool], overrides: dict[str, object]) -> None:
    plain = generate(build_engine(load("llama")), requests())
    answers = dict(zip([request.request_id for request in requests()], plain, strict=True))
    engine = build(lambda sequence: answers[sequence.request_id], lies, **overrides)
    assert generate(engine, requests()) == plain
    assert engine.stats().drafted_tokens.total
    assert not overrides or engine.stats().preemptions


def test_right_guesses_save_steps() -> None:
    answers = dict(zip(PROMPTS, generate(build_engine(load("llama")), greedy_requests()), strict=True))
    engine = build(lambda sequence: answers[sequence.request.prompt_token_ids], truth, max_num_seqs=8)
    generate(engine, greedy_requests())
    assert engine.stats().steps <= 4 + NUM_TOKENS / 9 + 1


def greedy_requests() -> list[GenerateRequest]:
    return [greedy(f"g{number}", prompt, NUM_TOKENS) for number, prompt in enumerate(PROMPTS)]


def outputs(events: list[EngineEvent]) -> list[str]:
    return [event.request_id for event in events if isinstance(event, TokenOutput)]


def test_what_a_step_drew_is_told_behind_the_launch_of_the_next_one_unless_that_has_prompts() -> None:
    """The device waits for the one, and the other takes the host long."""
    engine = build(lambda sequence: (0,) * NUM_TOKENS, truth)
    engine.add(greedy("r", PROMPTS[1], NUM_TOKENS))
    run_until_drafted(engine)
    assert engine.begin_step() == []
    assert outputs(engine.finish_step()) == ["r"]
    engine.add(greedy("s", PROMPTS[2], 4))
    assert outputs(engine.begin_step()) == ["r"]
    assert engine.finish_step() == []


def run_until_drafted(engine: Engine) -> None:
    """Until a step with drafts is in flight."""
    while not engine.stats().drafted_tokens.total:
        engine.step()
    assert is_in_flight(engine)


def test_where_nothing_is_guessed_steps_overlap_as_without_drafts() -> None:
    engine, transcript = build(lambda sequence: (), truth), Transcript()
    engine.add(greedy("r", PROMPTS[1], 60))
    num_steps = num_waits = 0
    while engine.has_work:
        events = engine.begin_step()
        num_steps, num_waits = num_steps + 1, num_waits + (not is_in_flight(engine))
        transcript.note([*events, *engine.finish_step()])
    assert num_waits <= 2 + 6, f"{num_waits} of {num_steps} steps began behind a wait"
    assert len(run(engine, transcript).tokens["r"]) == 60
