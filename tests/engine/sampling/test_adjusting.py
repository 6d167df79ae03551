"""Biases, penalties and barred tokens: as transformers' own processors have them, however a request is served."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.engine import Engine
from deployments.engine.sampling.penalties import upload_tokens
from deployments.errors import InvalidRequestError
from deployments.messages import Adjustments, GenerateRequest, SamplingParams, TokenOutput
from tests.engine.driving import build_engine, generate, hand_over_all, run
from tests.engine.families import VOCAB_SIZE, load, random_prompt, reference
from tests.engine.insides import scheduler_of
from tests.engine.processors import continue_adjusted

NUM_TOKENS = 24
PROMPTS = tuple(random_prompt(length, seed=length) for length in (1, 5, 8, 23, 40))

ADJUSTMENTS = {
    "repetition": Adjustments(repetition_penalty=1.4),
    "encouraged": Adjustments(repetition_penalty=0.8),
    "presence": Adjustments(presence_penalty=2.0),
    "frequency": Adjustments(frequency_penalty=0.7),
    "bias": Adjustments(logit_bias=((3, 4.0), (7, -100.0), (11, 2.5))),
    "all": Adjustments(((3, 4.0), (7, -6.0)), 1.2, 0.9, -0.3),
}
every_adjustment = pytest.mark.parametrize("name", ADJUSTMENTS)
either = pytest.mark.parametrize("is_pipelined", [False, True])


def requests_of(wanted: Adjustments | None, **sampling: float) -> list[GenerateRequest]:
    params = SamplingParams(**({"max_tokens": NUM_TOKENS, "temperature": 0.0, "adjustments": wanted} | sampling))  # type: ignore[arg-type]  # a test's shorthand
    return [GenerateRequest(f"r{i}", prompt, params) for i, prompt in enumerate(PROMPTS)]


def expected(wanted: Adjustments) -> list[tuple[int, ...]]:
    return [continue_adjusted(prompt, wanted, NUM_TOKENS) for prompt in PROMPTS]


@every_adjustment
def test_the_processors_change_what_is_generated(name: str) -> None:
    plain = [reference("llama", prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert expected(ADJUSTMENTS[name]) != plain, "any engine would pass"


@every_adjustment
@either
def test_tokens_are_those_of_transformers_processors(name: str, is_pipelined: bool) -> None:
    engine = build_engine(load("llama"), is_pipelined=is_pipelined)
    assert generate(engine, requests_of(ADJUSTMENTS[name])) == expected(ADJUSTMENTS[name])


@every_adjustment
def test_a_prompt_handed_over_is_continued_with_the_same_tokens(name: str) -> None:
    prefill, decode = build_engine(load("llama"), max_num_batched_tokens=16), build_engine(load("llama"))
    assert hand_over_all(prefill, decode, requests_of(ADJUSTMENTS[name])) == expected(ADJUSTMENTS[name])


@every_adjustment
@either
def test_what_was_generated_before_a_request_was_resumed_counts_as_generated(name: str, is_pipelined: bool) -> None:
    whole = expected(ADJUSTMENTS[name])
    resumed = [
        replace(request, generated_token_ids=tokens[:9])
        for request, tokens in zip(requests_of(ADJUSTMENTS[name]), whole, strict=True)
    ]
    assert generate(build_engine(load("llama"), is_pipelined=is_pipelined), resumed) == whole
    prefill, decode = build_engine(load("llama")), build_engine(load("llama"))
    assert hand_over_all(prefill, decode, resumed) == whole


@either
def test_preempted_requests_draw_the_same_tokens(is_pipelined: bool) -> None:
    engine = build_engine(load("llama"), is_pipelined=is_pipelined, num_blocks=16, enable_prefix_caching=False)
    assert generate(engine, requests_of(ADJUSTMENTS["all"])) == expected(ADJUSTMENTS["all"])
    assert engine.stats().preemptions > 0


@either
def test_requests_with_and_without_adjustments_share_a_batch(is_pipelined: bool) -> None:
    names = [None, "all", "frequency", None, "repetition"]
    requests = [
        replace(request, sampling=replace(request.sampling, adjustments=None if name is None else ADJUSTMENTS[name]))
        for request, name in zip(requests_of(None), names, strict=True)
    ]
    alone = [
        continue_adjusted(prompt, Adjustments() if name is None else ADJUSTMENTS[name], NUM_TOKENS)
        for prompt, name in zip(PROMPTS, names, strict=True)
    ]
    assert generate(build_engine(load("llama"), is_pipelined=is_pipelined), requests) == alone


@either
def test_drawn_tokens_are_equal_however_a_request_is_served(is_pipelined: bool) -> None:
    requests = requests_of(ADJUSTMENTS["all"], temperature=0.9, top_p=0.95, seed=3)
    here = generate(build_engine(load("llama"), is_pipelined=is_pipelined), requests)
    assert here != generate(build_engine(load("llama")), requests_of(None, temperature=0.9, top_p=0.95, seed=3))
    prefill, decode = build_engine(load("llama"), max_num_batched_tokens=16), build_engine(load("llama"))
    assert hand_over_all(prefill, decode, requests) == here
    resumed = [replace(request, generated_token_ids=t[:5]) for request, t in zip(requests, here, strict=True)]
    assert generate(build_engine(load("llama")), resumed) == here


class Guessing:
    """Proposes drafts before each step, the first of them right."""

    def __init__(self, engine: Engine, whole: tuple[int, ...]) -> None:
        self.engine, self.whole = engine, whole

    def run(self) -> list[int]:
        tokens: list[int] = []
        while self.engine.has_work:
            for sequence in scheduler_of(self.engine).running:
                sequence.propose((*self.whole[len(tokens) :][:2], 0, 0) if tokens else ())
            tokens += [t for e in self.engine.step() if isinstance(e, TokenOutput) for t in e.token_ids]
        return tokens


@every_adjustment
def test_drafts_before_a_draw_count_as_generated(name: str) -> None:
    request = requests_of(ADJUSTMENTS[name])[3]
    whole = continue_adjusted(request.prompt_token_ids, ADJUSTMENTS[name], NUM_TOKENS)
    engine = build_engine(load("llama"))
    engine.add(request)
    assert tuple(Guessing(engine, whole).run()) == whole
    assert engine.stats().steps < NUM_TOKENS


@pytest.mark.parametrize("num_generated", [0, 3])
@either
def test_no_stop_token_comes_before_min_tokens(is_pipelined: bool, num_generated: int) -> None:
    prompt = PROMPTS[3]
    plain = reference("llama", prompt, NUM_TOKENS)
    stops, least = plain[4:6], 8
    whole = continue_adjusted(prompt, Adjustments(min_tokens=least), NUM_TOKENS, stops)
    end = next((i for i, token in enumerate(whole) if token in stops), NUM_TOKENS - 1)
    assert end >= least > plain.index(stops[0])
    sampling = SamplingParams(NUM_TOKENS, 0.0, stop_token_ids=stops, adjustments=Adjustments(min_tokens=least))
    request = GenerateRequest("r", prompt, sampling, generated_token_ids=whole[:num_generated])
    assert generate(build_engine(load("llama"), is_pipelined=is_pipelined), [request]) == [whole[: end + 1]]


def test_a_stop_token_that_is_first_to_come_after_min_tokens_ends_the_request() -> None:
    bias = ((9, 100.0),)
    sampling = SamplingParams(NUM_TOKENS, 0.0, stop_token_ids=(9,), adjustments=Adjustments(bias, min_tokens=4))
    engine = build_engine(load("llama"))
    engine.add(GenerateRequest("r", PROMPTS[2], sampling))
    transcript = run(engine)
    assert len(transcript.tokens["r"]) == 5 and transcript.tokens["r"][-1] == 9
    assert 9 not in transcript.tokens["r"][:4]


def test_the_logits_themselves_stay_as_they_are() -> None:
    engine = build_engine(load("llama"))
    plain = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    requests = [
        GenerateRequest("a", PROMPTS[3], replace(plain, adjustments=ADJUSTMENTS["all"])),
        GenerateRequest("b", PROMPTS[3], plain),
    ]
    assert generate(engine, requests)[1] == reference("llama", PROMPTS[3], NUM_TOKENS)


@settings(max_examples=50)
@given(
    tokens=st.lists(st.integers(-3, 9), max_size=12),
    drawn=st.lists(st.integers(0, 9), min_size=3, max_size=3),
)
def test_a_pending_token_is_put_in_where_another_names_its_draw(tokens: list[int], drawn: list[int]) -> None:
    found = upload_tokens(np.array(tokens, np.int32), torch.tensor(drawn), torch.device("cpu"))
    assert found.tolist() == [token if token >= 0 else drawn[-1 - token] for token in tokens]


@pytest.mark.parametrize(
    ("name", "wanted", "bound"),
    [
        ("presence_penalty", Adjustments(presence_penalty=2.1), "2.1, must be from -2.0 to 2.0"),
        ("frequency_penalty", Adjustments(frequency_penalty=float("nan")), "nan, must be from -2.0 to 2.0"),
        ("repetition_penalty", Adjustments(repetition_penalty=0.0), "0.0, must be from 0.1 to 10.0"),
        ("repetition_penalty", Adjustments(repetition_penalty=float("inf")), "inf, must be from 0.1 to 10.0"),
        ("min_tokens", Adjustments(min_tokens=NUM_TOKENS + 1), f"{NUM_TOKENS + 1}, must be from 0 to {NUM_TOKENS}"),
        ("logit_bias", Adjustments(((1, 101.0),)), "101.0, must be from -100.0 to 100.0"),
        ("logit_bias", Adjustments(((VOCAB_SIZE, 1.0),)), f"token id {VOCAB_SIZE} is not in the vocabulary"),
        ("logit_bias", Adjustments(((-1, 1.0),)), "token id -1 is not in the vocabulary"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name_value_and_bound(name: str, wanted: Adjustments, bound: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        build_engine(load("llama")).add(requests_of(wanted)[0])
    assert refused.value.param == name and bound in str(refused.value)
