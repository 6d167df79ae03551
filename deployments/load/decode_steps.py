"""What steps without prompts took, told from an engine's counters. Routing and the planner learn by it. Pure."""

from dataclasses import dataclass

from deployments.engine.stats import EngineStats


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """Steps that drew a token for each sequence, and did nothing else.

    Attributes:
        steps: so many.
        sequences: of all of them together.
        seconds: that they took.
    """

    steps: float
    sequences: float
    seconds: float


def decode_steps_between(now: EngineStats, before: EngineStats) -> DecodeSteps | None:
    """Of one engine between two readings; None: there were none, or the counters are of another start.

    Told from the gaps between tokens: each step makes one for each sequence that runs, with a prompt in it or not.
    """
    steps, prefill_steps = now.steps - before.steps, now.prefill_steps - before.prefill_steps
    num_gaps = sum(now.itl_s.counts) - sum(before.itl_s.counts)
    if not 0 <= prefill_steps < steps or num_gaps <= 0:
        return None
    batch = num_gaps / steps
    seconds = (now.itl_s.total - before.itl_s.total) / batch - (now.prefill_s - before.prefill_s)
    return DecodeSteps(steps - prefill_steps, batch * (steps - prefill_steps), seconds)
