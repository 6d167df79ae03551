"""What steps take of engines that are alone, where they were measured beside each other."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from deployments.simulator.service import Setup
from load_tests.schedule import Planned

# Of the factors that are looked for: they change by less than a hundredth after four.
_NUM_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Means:
    """What steps took in the mean.

    Attributes:
        gap_s: between two tokens at the decode engines.
        token_s: a prompt token at the prefill engines.
    """

    gap_s: float
    token_s: float


def alone(setup: Setup, slowdown: float, wanted: Means, play: Callable[[Setup], Means]) -> Setup:
    """The same service with engines that slow each other, each faster by itself, so that the means are as measured.

    Args:
        setup: as both pools were measured while both computed.
        slowdown: as `Setup.shared_slowdown`.
        wanted: that were measured.
        play: the load that was measured, to such a service.
    """
    assert setup.prefill is not None, "one engine alone is slowed by nobody"
    decode, prefill, found = setup.decode.curves, setup.prefill.curves, replace(setup, shared_slowdown=slowdown)
    decode_times = prefill_times = 1.0
    for _ in range(_NUM_ROUNDS):
        means = play(found)
        decode_times *= wanted.gap_s / means.gap_s
        prefill_times *= wanted.token_s / means.token_s
        found = replace(
            found,
            decode=replace(setup.decode, curves=decode.slower(decode_times)),
            prefill=replace(setup.prefill, curves=prefill.slower(prefill_times)),
        )
    return found


def answer_beside_prompts() -> list[Planned]:
    """One answer that takes half a minute or so, and prompts for some seconds, twice."""
    draw = random.Random(1)

    def planned(session: str, at_s: float, prompt_tokens: int, output_tokens: int) -> Planned:
        prompt = tuple(draw.randrange(1000, 40_000) for _ in range(prompt_tokens))
        return Planned("beside", session, 0, at_s, 0.0, prompt, output_tokens)

    prompts = [planned(f"{at_s:g} {i}", at_s, 160, 1) for at_s in (4.0, 12.0) for i in range(12)]
    return [planned("answer", 0.0, 32, 700), *prompts]
