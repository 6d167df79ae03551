"""Answers with a grammar: they follow it however their request is served, and nobody else's tokens change."""

import os
import re
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.api.answer_grammar import build_grammar
from deployments.api.reasoning.parser import ThoughtRules
from deployments.engine.engine import Engine
from deployments.messages import Adjustments, GenerateRequest, GivenUp, Grammar, SamplingParams, TokenOutput
from tests.engine.driving import Transcript, build_engine, generate, greedy, hand_over_all, run
from tests.engine.families import random_prompt, reference
from tests.engine.grammars import END, load_with_tokenizer, regex, text_of
from tests.engine.insides import CompileGrammar, compile_grammars_by, guides_of, preempt, sequence_of

PROMPT = random_prompt(21, seed=5)
PATTERN = r"[a-c]{1,3}(-[0-9]{2,4}){2,6}"
GRAMMAR = regex(PATTERN)
NUM_TOKENS = 64

either = pytest.mark.parametrize("is_pipelined", [False, True])


def build(is_pipelined: bool = False, **overrides: Any) -> Engine:
    return build_engine(load_with_tokenizer("llama"), is_pipelined=is_pipelined, **overrides)


def guided(request_id: str, seed: int = 0, *, grammar: Grammar = GRAMMAR, temperature: float = 1.0) -> GenerateRequest:
    sampling = SamplingParams(NUM_TOKENS, temperature=temperature, seed=seed, stop_token_ids=(END,), grammar=grammar)
    return GenerateRequest(request_id, PROMPT, sampling)


def unbroken(seed: int) -> tuple[int, ...]:
    return generate(build(), [guided("r", seed)])[0]


@either
def test_answers_follow_their_grammar_and_end_where_it_does(is_pipelined: bool) -> None:
    answers = generate(build(is_pipelined), [guided(f"r{seed}", seed) for seed in range(8)])
    assert all(re.fullmatch(PATTERN, text_of(tokens)) for tokens in answers)
    assert len(set(answers)) > 1, "the model chooses among what is allowed"
    assert answers[3] == unbroken(3)


@either
def test_others_in_the_batch_draw_as_ever(is_pipelined: bool) -> None:
    requests = [greedy("plain", PROMPT, 30), guided("r"), greedy("other", PROMPT[:7], 30)]
    plain, answer, other = generate(build(is_pipelined), requests)
    assert plain == reference("llama", PROMPT, 30) and other == reference("llama", PROMPT[:7], 30)
    assert re.fullmatch(PATTERN, text_of(answer))


@either
@pytest.mark.parametrize("seed", [1, 2])
def test_a_hand_off_changes_nothing(is_pipelined: bool, seed: int) -> None:
    prefill, decode = build(is_pipelined), build(is_pipelined)
    assert hand_over_all(prefill, decode, [guided("r", seed)]) == [unbroken(seed)]
    assert prefill.num_sequences == decode.num_sequences == 0


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_a_resumed_answer_goes_on_where_it_was(num_tokens: int) -> None:
    tokens = unbroken(1)
    request = replace(guided("r", 1), generated_token_ids=tokens[:num_tokens])
    assert generate(build(), [request]) == [tokens]
    assert hand_over_all(build(), build(), [replace(request, request_id="h")]) == [tokens]


# Any text up to the mark, where the grammar begins; and a bias, for the model would rarely write it.
THINKING = build_grammar(GRAMMAR, None, ThoughtRules("<", ">", is_open=True), (END,))
EAGER = Adjustments(logit_bias=((ord(">"), 3.0),))


def thinking(seed: int) -> GenerateRequest:
    assert THINKING is not None
    request = guided("r", seed, grammar=THINKING)
    return replace(request, sampling=replace(request.sampling, adjustments=EAGER))


@either
def test_what_stands_before_a_grammar_is_as_the_model_likes_however_it_is_served(is_pipelined: bool) -> None:
    (tokens,) = generate(build(is_pipelined), [thinking(1)])
    thoughts, _, form = bytes(tokens[:-1]).partition(b">")
    assert len(thoughts) > 3 and re.fullmatch(PATTERN, form.decode().strip()) and tokens[-1] == END
    assert hand_over_all(build(is_pipelined), build(is_pipelined), [thinking(1)]) == [tokens]
    for num_tokens in (2, len(thoughts), len(thoughts) + 1, len(thoughts) + 4):
        request = replace(thinking(1), generated_token_ids=tokens[:num_tokens])
        assert generate(build(is_pipelined), [request]) == [tokens]


@either
def test_a_preempted_answer_goes_on_where_it_was(is_pipelined: bool) -> None:
    engine, transcript = build(is_pipelined), Transcript()
    engine.add(guided("r", 1))
    while len(transcript.tokens["r"]) < 5:
        transcript.note(engine.step())
    preempt(engine, sequence_of(engine, "r"))
    run(engine, transcript)
    assert tuple(transcript.tokens["r"]) == unbroken(1)


def test_drafts_of_an_answer_with_a_grammar_are_not_tried_without_masks_behind_them() -> None:
    engine, transcript = build(), Transcript()
    engine.add(guided("r", 1))
    while "r" not in transcript.finished:
        sequence_of(engine, "r").propose((ord("x"), ord("y")))
        transcript.note(engine.step())
    assert tuple(transcript.tokens["r"]) == unbroken(1)


def test_a_grammar_goes_before_penalties_and_biases() -> None:
    pushed = Adjustments(logit_bias=((ord("x"), 100.0), (END, 100.0)), frequency_penalty=1.5)
    request = guided("r", 1)
    (tokens,) = generate(build(), [replace(request, sampling=replace(request.sampling, adjustments=pushed))])
    assert re.fullmatch(PATTERN, text_of(tokens)) and text_of(tokens).count("-") == 2, "it ends as soon as it may"


def test_a_grammar_that_fails_ends_its_request_alone() -> None:
    engine, events = build(), []
    engine.add(guided("bad", grammar=Grammar('{"grammars":[{"lark_grammar":"start: nothing"}]}', (END,), "grammar")))
    engine.add(greedy("plain", PROMPT, 12))
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    (lost,) = [event for event in events if isinstance(event, GivenUp)]
    assert lost.request_id == "bad" and "nothing" in str(lost.error)
    tokens = [event.token_ids[0] for event in events if isinstance(event, TokenOutput)]
    assert tuple(tokens) == reference("llama", PROMPT, 12) and engine.num_free_blocks == engine.limits.num_blocks


def test_a_model_without_a_tokenizer_gives_the_request_up() -> None:
    engine = build_engine(replace(load_with_tokenizer("llama"), path=""))
    engine.add(guided("r"))
    events = []
    while engine.has_work:
        events += engine.step()
    assert any(isinstance(event, GivenUp) and "tokenizer.json" in str(event.error) for event in events)


@either
def test_others_run_while_a_grammar_is_compiled(is_pipelined: bool) -> None:
    may_end: Future[None] = Future()
    engine, transcript = build(is_pipelined), Transcript()

    def compile_slowly(compile_grammar: CompileGrammar, grammar: Grammar, token_ids: list[int]) -> object:
        may_end.result()
        return compile_grammar(grammar, token_ids)

    compile_grammars_by(engine, compile_slowly)
    engine.add(guided("r", 1))
    engine.add(greedy("plain", PROMPT, 40))
    while "plain" not in transcript.finished:
        transcript.note(engine.step())
    assert tuple(transcript.tokens["plain"]) == reference("llama", PROMPT, 40) and not transcript.tokens["r"]
    may_end.set_result(None)
    run(engine, transcript)
    assert tuple(transcript.tokens["r"]) == unbroken(1)


def test_an_aborted_answer_leaves_nothing() -> None:
    engine = build()
    engine.add(guided("r"))
    engine.abort("r")
    engine.check_integrity()
    assert not list(guides_of(engine))
    assert re.fullmatch(PATTERN, text_of(generate(engine, [guided("r")])[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives threads a priority of their own")
@pytest.mark.parametrize("niceness", [0, 15], ids=["as-we-are", "in-a-worker-of-ray"])
def test_compiling_lets_the_steps_of_others_go_first(niceness: int) -> None:
    with ThreadPoolExecutor(1) as apart:  # whose priority is nobody else's
        own, later = apart.submit(priorities_of_a_run, niceness).result(60)
    assert sum(priority != own for priority in later) == 1, (own, later)
    assert max(later) >= own + 10


def priorities_of_a_run(niceness: int) -> tuple[int, list[int]]:
    """Of this thread, which takes the steps, made at least so nice; and of those that a run with a grammar started."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, priority_of(thread)))
    before = set(threads())
    engine = build()
    generate(engine, [guided("r"), greedy("plain", PROMPT, 3)])
    return priority_of(thread), [priority_of(other) for other in threads() if other not in before]


def threads() -> list[int]:
    """Of this process, by the kernel's numbers."""
    return [int(path.name) for path in Path("/proc/self/task").iterdir()]


def priority_of(thread: int) -> int:
    """Its niceness; more than any of one that runs where nobody else wants to."""
    is_idle = os.sched_getscheduler(thread) == os.SCHED_IDLE
    return 100 if is_idle else os.getpriority(os.PRIO_PROCESS, thread)
