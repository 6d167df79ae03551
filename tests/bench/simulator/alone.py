"""What steps take of engines that are alone, where they were measured beside each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from deployments.simulator.service import Setup

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
