"""Runs engines step by step, checking after each that nothing is lost, and hands KV from one to another."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.handoff.outgoing import End, Part, Word
from deployments.engine.handoff.states import Clock
from deployments.engine.model.load import LoadedModel
from deployments.messages import ChunkReady, EngineEvent, GenerateRequest, SamplingParams, TokenOutput
from tests.engine.insides import guides_of

BLOCK_SIZE = 8


@dataclass
class FakeClock:
    """Seconds that pass when a test says so."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def build_engine(
    loaded: LoadedModel, *, is_pipelined: bool | None = None, clock: Clock = time.monotonic, **overrides: object
) -> Engine:
    settings: dict[str, object] = {
        "block_size": BLOCK_SIZE,
        "num_blocks": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "lease_s": 600.0,  # by the default of 15 a slow machine loses hand-offs
    }
    return Engine(loaded, EngineConfig.model_validate(settings | overrides), is_pipelined, clock)


def greedy(request_id: str, prompt: Iterable[int], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0))


class Transcript:
    """Tokens per request, put together from events that must be gapless and end once."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.cached: dict[str, int] = {}
        self.finished: set[str] = set()

    def note(self, events: Iterable[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenOutput):
                assert event.request_id not in self.finished, f"{event} after the end"
                assert event.index == len(self.tokens[event.request_id]), f"{event} leaves a gap"
                self.tokens[event.request_id] += event.token_ids
                self.cached.setdefault(event.request_id, event.num_cached_tokens)
                if event.finish_reason is not None:
                    self.finished.add(event.request_id)


def run(engine: Engine, transcript: Transcript | None = None, max_steps: int = 10_000) -> Transcript:
    """Step until nothing is left to do; steps do not count while a grammar's thread works, which others may hold up."""
    transcript, num_steps = transcript or Transcript(), 0
    while engine.has_work:
        assert num_steps < max_steps, f"still at work after {max_steps} steps: {engine.stats()}"
        num_steps += not guides_of(engine).is_busy
        transcript.note(engine.step())
        engine.check_integrity()
    return transcript


def generate(engine: Engine, requests: Iterable[GenerateRequest]) -> list[tuple[int, ...]]:
    """Run requests together; the tokens of each, with what it came with of them."""
    requests = list(requests)
    transcript = Transcript()
    for request in requests:
        engine.add(request)
        transcript.tokens[request.request_id] += request.generated_token_ids
    run(engine, transcript)
    assert transcript.finished == {request.request_id for request in requests}
    assert engine.num_free_blocks == engine.limits.num_blocks
    return [tuple(transcript.tokens[request.request_id]) for request in requests]


class Taken:
    """A hand-off that was given away, and what was told of it.

    Args:
        engine: that computes it.
        request_id: of the prompt.
        releases: whether each chunk is given back as soon as it is there.
    """

    def __init__(self, engine: Engine, request_id: str, *, releases: bool = False) -> None:
        handoff = engine.take_handoff(request_id)
        assert handoff is not None
        self.handoff = handoff
        self.words: list[Word] = []
        self._releases = releases
        handoff.watch(self._note)

    def _note(self, word: Word) -> None:
        self.words.append(word)
        if self._releases and isinstance(word, Part):
            self.handoff.release(word.chunk.index)

    @property
    def parts(self) -> list[Part]:
        return [word for word in self.words if isinstance(word, Part)]

    @property
    def chunks(self) -> list[ChunkReady]:
        return [part.chunk for part in self.parts]

    @property
    def end(self) -> End | None:
        last = self.words[-1] if self.words else None
        return last if isinstance(last, End) else None


def prefill_all(engine: Engine, request: GenerateRequest, first_block: int = 0) -> list[tuple[ChunkReady, Tensor]]:
    """Compute a prompt for another engine; every chunk, or part of one, in order, given back as soon as it is there."""
    engine.prefill(request, first_block)
    taken = Taken(engine, request.request_id, releases=True)
    # On a GPU a chunk may be complete, and released, some time behind the step.
    while engine.has_work or taken.end is None:
        engine.step()
        engine.check_integrity()
    return [(part.chunk, part.kv) for part in taken.parts]


def hand_over(
    prefill: Engine, decode: Engine, prompts: Iterable[tuple[int, ...]], num_tokens: int
) -> list[tuple[int, ...]]:
    """Compute prompts in one engine and go on in the other, greedily; the tokens of each prompt."""
    return hand_over_all(prefill, decode, [greedy(f"r{i}", prompt, num_tokens) for i, prompt in enumerate(prompts)])


def hand_over_all(prefill: Engine, decode: Engine, requests: Iterable[GenerateRequest]) -> list[tuple[int, ...]]:
    """Compute prompts in one engine and go on in the other; the tokens of each, those it came with included."""
    requests, transcript = list(requests), Transcript()
    for request in requests:
        transcript.tokens[request.request_id] += request.generated_token_ids
        decode.add(request, remote_threshold=0)
        while decode.stats().num_reserved == 0:  # not in a step in which another sequence outgrows its KV
            transcript.note(decode.step())
        for chunk, tensor in prefill_all(prefill, request):
            transcript.note(decode.import_chunk(chunk, tensor))
            decode.check_integrity()
    run(decode, transcript)
    return [tuple(transcript.tokens[request.request_id]) for request in requests]
