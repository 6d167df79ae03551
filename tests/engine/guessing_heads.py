"""Engines whose head guesses, what they are asked, and whether it guessed as it would by itself."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deployments.engine.engine import Engine
from deployments.engine.model.eagle3_files import load_eagle3
from deployments.engine.model.load import LoadedModel, optimize_layers, prepare_model
from deployments.engine.scheduling.sequence import Sequence
from deployments.engine.speculation.base import Wish
from deployments.messages import Adjustments, GenerateRequest, SamplingParams
from tests.engine import eagle3_heads
from tests.engine.driving import build_engine, generate
from tests.engine.eagle3_heads import NUM_LAYERS, guesses, target, weights
from tests.engine.families import CPU, random_prompt
from tests.engine.insides import drafter_of

NUM_TOKENS = 24
SAMPLINGS = [
    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=3, num_logprobs=1),
    SamplingParams(
        max_tokens=NUM_TOKENS, temperature=1.0, seed=4, adjustments=Adjustments(((5, 2.0),), 1.2, 0.5, 0.5, 4)
    ),
]
SETTINGS = {"method": "eagle3", "model": "beside", "is_adaptive": False, "max_drafts": 4}


@cache
def with_head(*, optimized: bool = False) -> LoadedModel:
    model = copy.deepcopy(target())
    with TemporaryDirectory() as folder:
        head = load_eagle3(eagle3_heads.save(Path(folder), weights()), model, model.config)
    loaded = replace(prepare_model(model, "", CPU), head=head)
    return optimize_layers(loaded) if optimized else loaded


def alone() -> LoadedModel:
    return replace(with_head(), head=None)


def in_groups() -> LoadedModel:
    """As if the second half of the layers had a window, which no request is as long as."""
    loaded = with_head()
    group, size = loaded.kv_shape.group, NUM_LAYERS // 2
    groups = replace(group, layers=group.layers[:size]), replace(group, layers=group.layers[size:], window=1000)
    return replace(loaded, kv_shape=replace(loaded.kv_shape, groups=groups))


def guessing(loaded: LoadedModel | None = None, **overrides: Any) -> Engine:
    return build_engine(loaded or with_head(), speculation=SETTINGS, **overrides)


def requests() -> list[GenerateRequest]:
    prompts = [random_prompt(13, seed=1), random_prompt(90, seed=2), (3, 4, 5, 6) * 6]
    return [
        GenerateRequest(f"r{number}", prompt, sampling)
        for number, (prompt, sampling) in enumerate(itertools.product(prompts, SAMPLINGS))
    ]


@cache
def plain() -> list[tuple[int, ...]]:
    return generate(build_engine(alone()), requests())


class Helped:
    """Takes note of what a head guesses, and has the engine try what the answer is in its place, or a lie.

    Args:
        engine: whose head it is.
        answers: by request.
        lies: whether to try something else in this place of an answer.
    """

    def __init__(self, engine: Engine, answers: dict[str, tuple[int, ...]], lies: Callable[[int], bool]) -> None:
        drafter = drafter_of(engine)
        self.guessed: list[tuple[str, int, list[int], tuple[int, ...]]] = []
        self._answers, self._lies, self._draft = answers, lies, drafter.draft
        self._view = lambda wish: drafter._of(wish).begin
        drafter.draft = self.draft

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        drafts = self._draft(wishes)
        for wish, tokens in zip(wishes, drafts, strict=True):
            name, known = wish.sequence.request_id, wish.sequence.token_ids.tolist()
            self.guessed.append((name, self._view(wish), known, tokens))
        return [self._help(wish.sequence, len(tokens)) for wish, tokens in zip(wishes, drafts, strict=True)]

    def _help(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        first = sequence.num_tokens - len(sequence.request.prompt_token_ids)
        rest = self._answers[sequence.request_id][first : first + count]
        return tuple(token ^ self._lies(first + place) for place, token in enumerate(rest))

    def check(self, first: int = 0) -> None:
        """Greedy sequences were guessed as by a head that has had all states from this token on."""
        head = with_head().head
        assert head is not None
        found = [entry for entry in self.guessed if entry[0] in GREEDY]
        assert len(found) > 4
        for name, begin, known, tokens in found:
            assert begin == first, f"{name} is seen from {begin} on"
            assert tokens == guesses(head, known, len(tokens), first), f"{name} at {len(known)}"


GREEDY = {"r0", "r3", "r6"}


def helped(engine: Engine, lies: Callable[[int], bool]) -> Helped:
    names = [request.request_id for request in requests()]
    return Helped(engine, dict(zip(names, plain(), strict=True)), lies)
