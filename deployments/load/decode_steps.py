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

    Told from the gaps between tokens: each step makes one for each sequence that runs. Those that ended with a step
    with prompts are left out. They are counted, not inferred: an engine that was idle before has no sequence beside its
    prompts, one that is busy has many.
    """
    steps, prefill_steps = now.steps - before.steps, now.prefill_steps - before.prefill_steps
    num_gaps = sum(now.itl_s.counts) - sum(before.itl_s.counts) - (now.prefill_gaps - before.prefill_gaps)
    if not 0 <= prefill_steps < steps or num_gaps <= 0:
        return None
    gap_s = (now.itl_s.total - before.itl_s.total - (now.prefill_gap_s - before.prefill_gap_s)) / num_gaps
    num_decode_steps = steps - prefill_steps
    return DecodeSteps(num_decode_steps, num_gaps, gap_s * num_decode_steps)
