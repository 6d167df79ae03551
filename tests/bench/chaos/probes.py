"""The requests of the bench: few enough that each one's tokens are known, enough that not all are cached. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROMPT_TOKENS = (60, 260)
MAX_TOKENS = (12, 40)
# Ids of words and word parts; those below are the special tokens of the default model.
_TOKEN_IDS = (100, 49_000)
_SAMPLED_TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True)
class Probe:
    """A request whose answer does not depend on when, where and beside what it is computed.

    Attributes:
        number: its place among the probes.
        prompt: token ids.
        max_tokens: exactly as many come, since the end of a text is ignored.
        temperature: 0 is greedy.
        seed: of the draws.
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int

    def body(self, model: str, stream: bool) -> dict[str, Any]:
        """For `POST /v1/completions`."""
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": stream,
            "ignore_eos": True,
            "return_token_ids": True,
        }


@dataclass(frozen=True, slots=True)
class Call:
    """One sending of a probe.

    Attributes:
        probe: what is asked.
        stream: whether token by token.
        leaves_after_s: when the client leaves, answered or not; None: it stays.
    """

    probe: Probe
    stream: bool = True
    leaves_after_s: float | None = None


def build_probes(
    seed: int,
    num_probes: int,
    prompt_tokens: tuple[int, int] = PROMPT_TOKENS,
    max_tokens: tuple[int, int] = MAX_TOKENS,
    first_number: int = 0,
) -> list[Probe]:
    """Draw the set, with lengths from and to; every second one is greedy."""
    rng = random.Random(seed)
    return [
        Probe(
            number=number,
            prompt=tuple(rng.randrange(*_TOKEN_IDS) for _ in range(rng.randint(*prompt_tokens))),
            max_tokens=rng.randint(*max_tokens),
            temperature=_SAMPLED_TEMPERATURE if number % 2 else 0.0,
            seed=rng.randrange(2**31),
        )
        for number in range(first_number, first_number + num_probes)
    ]


class Deck:
    """Calls without end: all probes in random order, again and again.

    Args:
        probes: what is asked.
        seed: of the order, of who streams and of who leaves.
        leave_share: of the clients, who leave within `leave_within_s`.
    """

    def __init__(
        self, probes: Sequence[Probe], seed: int, leave_share: float = 0.0, leave_within_s: float = 3.0
    ) -> None:
        self._probes = list(probes)
        self._rng = random.Random(seed)
        self._leave_share = leave_share
        self._leave_within_s = leave_within_s
        self._left: list[Probe] = []

    def draw(self) -> Call:
        """The next call; two of three are streams."""
        if not self._left:
            self._left = self._rng.sample(self._probes, len(self._probes))
        stream, leaves = self._rng.random() < 2 / 3, self._rng.random() < self._leave_share
        leaves_after_s = self._rng.uniform(0.0, self._leave_within_s)
        return Call(self._left.pop(), stream, leaves_after_s if leaves else None)
