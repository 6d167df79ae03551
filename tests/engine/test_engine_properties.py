"""Two engines and everything that may happen between them, in any order: nothing is lost, and no token is wrong."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeAlias

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.engine.engine import Engine
from deployments.engine.handoff.outbox import TakenHandoff
from deployments.engine.handoff.outgoing import Part, Word
from deployments.engine.model.eagle3 import Eagle3Head
from deployments.engine.model.load import LoadedModel, prepare_model
from deployments.engine.speculation.base import Wish
from deployments.messages import (
    Adjustments,
    EngineEvent,
    GenerateRequest,
    HandoffExpired,
    Placed,
    SamplingParams,
    TokenOutput,
)
from tests.engine.drafters import Knowing, lies, mixture, truth, with_drafter
from tests.engine.driving import FakeClock, generate
from tests.engine.eagle3_heads import head_of
from tests.engine.families import CPU, small_model
from tests.engine.insides import drafter_of, is_between_engines, scheduler_of
from tests.engine.small import BLOCK_SIZE, LEASE_S, POOL_BLOCKS, build_small, iter_events, tiny
from tests.tiny_models import ONE_LAYER

Model: TypeAlias = Callable[[], LoadedModel]

MAX_PROMPT, MAX_TOKENS, VOCAB_SIZE = 30, 10, ONE_LAYER["vocab_size"]


@cache
def deeper() -> LoadedModel:
    """The same behind a layer that adds nothing."""
    weights = tiny().model.state_dict()
    model = small_model("LlamaConfig", **(ONE_LAYER | {"num_hidden_layers": 2}))
    own = {name.replace("layers.0.", "layers.1."): value for name, value in weights.items()}
    model.load_state_dict(own, strict=False)
    first = model.model.layers[0]
    for linear in (first.self_attn.o_proj, first.mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    return prepare_model(model, "", CPU)


@cache
def similar() -> LoadedModel:
    """Hardly another model."""
    model = copy.deepcopy(tiny().model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.add_(0.3 * weights.std() * torch.randn_like(weights))
    return prepare_model(model, "", CPU)


@cache
def windowed() -> LoadedModel:
    """A token sees five."""
    return prepare_model(small_model("MistralConfig", **(ONE_LAYER | {"sliding_window": 5})), "", CPU)


@cache
def mixed() -> LoadedModel:
    """A token sees five in two of three layers, and all in the other."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    changes = {"sliding_window": 5, "num_hidden_layers": 3, "layer_types": kinds}
    return prepare_model(small_model("Gemma3TextConfig", **(ONE_LAYER | changes)), "", CPU)


@cache
def keeping(model: Model) -> LoadedModel:
    """It, with all of its KV kept."""
    return replace(model(), kv_shape=model().kv_shape.keeping_all)


@cache
def tiny_head() -> Eagle3Head:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return head_of(tiny().model)


@cache
def alone(prompt: tuple[int, ...], sampling: SamplingParams, model: Model = tiny) -> tuple[int, ...]:
    """What the request generates with an engine of its own."""
    (tokens,) = generate(build_small(keeping(model)), [GenerateRequest("alone", prompt, sampling)])
    return tokens


def answer_of(request: GenerateRequest, model: Model = tiny) -> tuple[int, ...]:
    """What it generates, whatever else is asked about it."""
    return alone(request.prompt_token_ids, replace(request.sampling, num_logprobs=None), model)


@cache
def logprobs_of(tokens: tuple[int, ...], model: Model = tiny) -> list[float]:
    """Of all but the first of them, scored by an engine of its own."""
    engine = build_small(keeping(model), num_blocks=64)
    engine.add(GenerateRequest("scored", tokens, SamplingParams(max_tokens=1), num_prompt_logprobs=0))
    told = [event for event in iter_events(engine) if isinstance(event, TokenOutput)]
    return [token.logprob or 0.0 for token in told[0].prompt]


prompts = st.builds(
    lambda length, last: (*((i * 7) % VOCAB_SIZE for i in range(length - 1)), last),
    st.integers(1, MAX_PROMPT),
    st.integers(0, 2),
)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 2, 5, MAX_TOKENS]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1),
    stop_token_ids=st.sampled_from([(), (3, 17, 40)]),
    adjustments=st.sampled_from([None, None, Adjustments(((5, 2.0),), 1.3, 1.0, 0.5, min_tokens=1)]),
    num_logprobs=st.sampled_from([None, None, 2]),
)


@dataclass(frozen=True, eq=False)
class InFlight:
    """A part that its source has told of, and that may come whenever it likes."""

    handoff: TakenHandoff
    part: Part

    def deliver(self, engine: Engine) -> list[EngineEvent]:
        return engine.import_chunk(self.part.chunk, self.part.kv)


class Relay(RuleBasedStateMachine):
    """A prefill engine, a decode engine, and a network and clients without manners."""

    is_pipelined = False
    model: Model = staticmethod(tiny)
    num_blocks = POOL_BLOCKS
    layer_parts = 1

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        loaded = deeper() if self.layer_parts > 1 else self.model()
        shape = {"num_blocks": self.num_blocks, "handoff_layer_parts": self.layer_parts}
        self.prefill, self.decode = (
            build_small(loaded, is_pipelined=self.is_pipelined, clock=self.clock, **shape) for _ in range(2)
        )
        self.requests: dict[str, GenerateRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.unsent: list[Placed] = []
        self.untaken: list[str] = []
        self.in_flight: list[InFlight] = []
        self.arrived: list[InFlight] = []

    @rule(
        prompt=prompts,
        sampling=samplings,
        threshold=st.sampled_from([None, 0, 0, 9]),
        num_scored=st.sampled_from([None, None, None, 1]),
    )
    def add(
        self, prompt: tuple[int, ...], sampling: SamplingParams, threshold: int | None, num_scored: int | None
    ) -> None:
        request = GenerateRequest(f"r{len(self.requests)}", prompt, sampling, num_prompt_logprobs=num_scored)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []
        self.decode.add(request, threshold)

    @precondition(lambda self: self.decode.has_work)
    @rule()
    def step_decode(self) -> None:
        decoding = [s for s in scheduler_of(self.decode).running if s.is_decoding]
        if self.is_pipelined:  # then tokens come of what was started before
            decoding = [s for s in decoding if s.num_pending_tokens]
        preemptions = {s.request_id: s.num_preemptions for s in decoding}
        events = self.decode.step()
        self.note(events)
        got = {e.request_id for e in events if isinstance(e, TokenOutput)}
        for chosen in decoding:
            lost_blocks = chosen.num_preemptions > preemptions[chosen.request_id]
            assert chosen.request_id in got or lost_blocks, f"{chosen.request_id} got no token"

    @precondition(lambda self: self.prefill.has_work)
    @rule()
    def step_prefill(self) -> None:
        for event in self.prefill.step():
            if isinstance(event, TokenOutput):
                self.note_first_token(event)

    @precondition(lambda self: self.unsent)
    @rule(data=st.data())
    def send_to_prefill(self, data: st.DataObject) -> None:
        placed = data.draw(st.sampled_from(self.unsent))
        self.unsent.remove(placed)
        self.prefill.prefill(self.requests[placed.request_id], placed.num_cached_tokens // BLOCK_SIZE)
        self.untaken.append(placed.request_id)

    @precondition(lambda self: self.untaken)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.untaken))
        self.untaken.remove(request_id)
        handoff = self.prefill.take_handoff(request_id)
        assert self.prefill.take_handoff(request_id) is None, "given away twice"
        if handoff is not None:
            handoff.watch(partial(self.note_word, handoff))

    def note_word(self, handoff: TakenHandoff, word: Word) -> None:
        if isinstance(word, Part):
            self.in_flight.append(InFlight(handoff, word))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(item)
        self.note(item.deliver(self.decode))
        self.arrived.append(item)

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.arrived))
        if item.part.chunk.request_id in scheduler_of(self.decode).reserved:
            self.note(item.deliver(self.decode))
        else:
            assert item.deliver(self.decode) == []

    @precondition(lambda self: self.arrived)
    @rule(data=st.data(), lets_go=st.sampled_from([False, False, True]))
    def release(self, data: st.DataObject, lets_go: bool) -> None:
        item = data.draw(st.sampled_from(self.arrived))
        item.handoff.let_go() if lets_go else item.handoff.release(item.part.chunk.index)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def prefill_locally(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        waits = request_id in scheduler_of(self.decode).reserved
        assert self.decode.prefill_locally(request_id) is waits

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if self.decode.renew(request_id):
            self.prefill.renew(request_id)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), where=st.sampled_from(["decode", "prefill", "both"]))
    def abort(self, data: st.DataObject, where: str) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if where != "prefill":
            self.end(request_id)
        if where != "decode":
            self.prefill.abort(request_id)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.prefill.check_integrity()
        self.decode.check_integrity()

    def note(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, Placed) and event.remote:
                self.unsent.append(event)
            elif isinstance(event, TokenOutput):
                request, tokens = self.requests[event.request_id], self.tokens[event.request_id]
                assert event.request_id not in self.ended, f"{event} after the end"
                assert event.index == len(tokens)
                tokens += event.token_ids
                check_scores(request, event, self.model)
                whole = answer_of(request, self.model)
                assert tuple(tokens) == whole[: len(tokens)], "other tokens than alone"
                assert (event.finish_reason is not None) is (len(tokens) == len(whole))
                if event.finish_reason is not None:
                    self.ended.add(event.request_id)

    def note_first_token(self, event: TokenOutput) -> None:
        """The first token also comes from the prefill engine; if it is the last one too, nobody sends any KV."""
        request = self.requests[event.request_id]
        assert event.index == 0
        check_scores(request, event, self.model)
        assert event.token_ids == answer_of(request, self.model)[:1]
        if event.finish_reason is not None:
            self.end(event.request_id)

    def end(self, request_id: str) -> None:
        self.decode.abort(request_id)
        self.ended.add(request_id)

    def teardown(self) -> None:
        """Neither engine hears of the other again: the leases alone must end what is between them."""
        for _ in range(2000):
            self.clock.now_s += LEASE_S
            if not self.decode.has_work:
                break
            self.step_decode()
            self.decode.check_integrity()
        while self.prefill.has_work:
            events = self.prefill.step()
            assert all(isinstance(event, HandoffExpired) for event in events), "chunks of requests that are over"
        assert self.ended == set(self.requests), "not all requests came to an end"
        for engine in (self.prefill, self.decode):
            engine.check_integrity()
            assert engine.num_sequences == 0
            assert engine.num_free_blocks == self.num_blocks
            assert not is_between_engines(engine)
            assert not engine.has_work


def check_scores(request: GenerateRequest, event: TokenOutput, model: Model) -> None:
    """Logprobs are there where they were asked for, and of the right tokens."""
    prompt, is_asked = request.prompt_token_ids, request.sampling.num_logprobs is not None
    assert tuple(draw.token_id for draw in event.draws) == (event.token_ids if is_asked else ())
    is_scored = request.num_prompt_logprobs is not None and event.index == 0
    assert tuple(token.token_id for token in event.prompt) == (prompt[1:] if is_scored else ())
    if is_asked and event.index == 0:
        *_, expected = logprobs_of((*prompt, event.token_ids[0]), model)
        assert event.draws[0].logprob == pytest.approx(expected, abs=1e-4)
    if is_scored:
        assert [token.logprob for token in event.prompt] == pytest.approx(logprobs_of(prompt, model), abs=1e-4)


class PipelinedRelay(Relay):
    """The same with engines that start a step before they conclude the one before."""

    is_pipelined = True


class WindowedRelay(Relay):
    """The same with a window in every layer, and fewer blocks than a long sequence had without."""

    model = staticmethod(windowed)
    num_blocks = 6


class PipelinedWindowedRelay(WindowedRelay):
    """That with engines that start a step before they conclude the one before."""

    is_pipelined = True


class MixedRelay(Relay):
    """The same with a window in some layers, whose groups share a pool."""

    model = staticmethod(mixed)
    num_blocks = 18


class PipelinedMixedRelay(MixedRelay):
    """That with engines that start a step before they conclude the one before."""

    is_pipelined = True


class RelayByLayers(Relay):
    """What the last step of a prompt computes goes in parts."""

    layer_parts = 2


class SpeculatingRelay(Relay):
    """The same with a decode engine that guesses, two times of three rightly."""

    is_wrong = staticmethod(mixture)

    def __init__(self) -> None:
        super().__init__()
        speculating = build_small(is_pipelined=self.is_pipelined, clock=self.clock, speculation={"method": "ngram"})
        self.decode = with_drafter(speculating, lambda sequence: answer_of(sequence.request), self.is_wrong)


class LyingRelay(SpeculatingRelay):
    """The same with guesses that are always wrong."""

    is_wrong = staticmethod(lies)


class KnowingRelay(SpeculatingRelay):
    """The same with guesses that are always right."""

    is_wrong = staticmethod(truth)


class DraftModelRelay(Relay):
    """The same with a decode engine for which another model guesses, about as often rightly as wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = build_small(
            replace(tiny(), drafter=similar()),
            is_pipelined=self.is_pipelined,
            clock=self.clock,
            speculation={"method": "draft_model", "model": "beside", "is_adaptive": False, "max_drafts": 3},
        )


class HeadRelay(Relay):
    """The same with a decode engine that follows all with a head, and tries what is right two times of three."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = build_small(
            replace(tiny(), head=tiny_head()),
            is_pipelined=self.is_pipelined,
            clock=self.clock,
            speculation={"method": "eagle3", "model": "beside", "is_adaptive": False, "max_drafts": 3},
        )
        drafter = drafter_of(self.decode)
        guess, known = drafter.draft, Knowing(lambda sequence: answer_of(sequence.request), mixture)

        def guess_and_correct(wishes: list[Wish]) -> list[tuple[int, ...]]:
            assert all(1 <= len(tokens) <= 3 for tokens in guess(wishes))
            return known.draft(wishes)

        drafter.draft = guess_and_correct


class PipelinedHeadRelay(HeadRelay):
    """That with engines that start a step before they conclude the one before, where nothing is guessed."""

    is_pipelined = True


class PipelinedSpeculatingRelay(SpeculatingRelay):
    """That with engines that start a step before they conclude the one before, where nothing is guessed."""

    is_pipelined = True


class PipelinedDraftModelRelay(DraftModelRelay):
    """Likewise."""

    is_pipelined = True


TestRelay, TestPipelinedRelay, TestSpeculatingRelay = Relay.TestCase, PipelinedRelay.TestCase, SpeculatingRelay.TestCase
TestWindowedRelay, TestPipelinedWindowedRelay = WindowedRelay.TestCase, PipelinedWindowedRelay.TestCase
TestMixedRelay, TestPipelinedMixedRelay = MixedRelay.TestCase, PipelinedMixedRelay.TestCase
TestRelayByLayers = RelayByLayers.TestCase
TestRelayByLayers.settings = settings(max_examples=40, stateful_step_count=50)
TestLyingRelay, TestKnowingRelay = LyingRelay.TestCase, KnowingRelay.TestCase
TestDraftModelRelay = DraftModelRelay.TestCase
TestRelay.settings = TestPipelinedRelay.settings = settings(max_examples=80, stateful_step_count=50)
TestWindowedRelay.settings = TestPipelinedWindowedRelay.settings = TestRelay.settings
TestMixedRelay.settings = TestPipelinedMixedRelay.settings = settings(max_examples=40, stateful_step_count=50)
TestPipelinedSpeculatingRelay = PipelinedSpeculatingRelay.TestCase
TestPipelinedDraftModelRelay = PipelinedDraftModelRelay.TestCase
TestSpeculatingRelay.settings = TestDraftModelRelay.settings = settings(max_examples=40, stateful_step_count=50)
TestPipelinedSpeculatingRelay.settings = TestSpeculatingRelay.settings
TestPipelinedDraftModelRelay.settings = TestSpeculatingRelay.settings
TestHeadRelay, TestPipelinedHeadRelay = HeadRelay.TestCase, PipelinedHeadRelay.TestCase
TestHeadRelay.settings = TestPipelinedHeadRelay.settings = TestSpeculatingRelay.settings
TestLyingRelay.settings = TestKnowingRelay.settings = settings(max_examples=20, stateful_step_count=50)
