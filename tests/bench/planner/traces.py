"""Traces of which the traffic changes: bursts, days, mixes. Drawn at random, the same for the same seed."""

import math
import random
from collections.abc import Callable

from deployments.simulator.requests import Request

# Prompt and output tokens, each a log-normal's median and sigma.
Lengths = tuple[float, float, float, float]
CHAT: Lengths = (900, 0.9, 250, 0.7)
LONG: Lengths = (9000, 0.7, 200, 0.6)
WRITING: Lengths = (300, 0.6, 900, 0.5)


def draw(
    seconds: float,
    rate: Callable[[float], float],
    most: float,
    lengths: Callable[[float, random.Random], Lengths],
    seed: int,
) -> list[Request]:
    """Requests that come one by one at a rate that changes (by thinning), of lengths that change."""
    chance, at_s = random.Random(seed), 0.0
    requests: list[Request] = []
    while True:
        at_s += chance.expovariate(most)
        if at_s >= seconds:
            return requests
        if chance.random() * most < rate(at_s):
            prompt, prompt_sigma, output, output_sigma = lengths(at_s, chance)
            prompt_tokens = int(min(32_000, max(8, chance.lognormvariate(math.log(prompt), prompt_sigma))))
            output_tokens = int(min(4_000, max(1, chance.lognormvariate(math.log(output), output_sigma))))
            requests.append(Request(at_s, prompt_tokens, output_tokens))


def bursty_chat(seconds: float = 5400.0, base: float = 2.0, peak: float = 8.0, seed: int = 1) -> list[Request]:
    """Chat, with bursts of one to four minutes, some minutes apart."""
    chance, bursts, at_s = random.Random(seed + 100), [], 0.0
    while at_s < seconds:
        at_s += chance.uniform(240, 900)
        bursts.append((at_s, at_s + chance.uniform(60, 240)))
        at_s = bursts[-1][1]
    return draw(seconds, lambda t: peak if any(a <= t < b for a, b in bursts) else base, peak, lambda *_: CHAT, seed)


def long_context_day(seconds: float = 14_400.0, low: float = 0.1, high: float = 1.6, seed: int = 2) -> list[Request]:
    """Long prompts over a day, from a night to a noon and back; the day is as long as `seconds`."""

    def rate(at_s: float) -> float:
        return low + (high - low) * (1 - math.cos(2 * math.pi * at_s / seconds)) / 2

    return draw(seconds, rate, high, lambda *_: LONG, seed)


def shifting_mix(seconds: float = 7200.0, rate: float = 2.5, seed: int = 3) -> list[Request]:
    """From chat to long prompts with short answers, then to short prompts with long answers, and back."""
    phases = ((CHAT, 1.0), (LONG, 0.5), (WRITING, 1.6), (CHAT, 0.3))

    def phase(at_s: float) -> tuple[Lengths, float]:
        return phases[min(len(phases) - 1, int(at_s / seconds * len(phases)))]

    return draw(seconds, lambda t: rate * phase(t)[1], rate * 1.6, lambda t, _: phase(t)[0], seed)
