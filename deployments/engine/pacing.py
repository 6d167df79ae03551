"""When steps that overlap are chosen, launched and concluded, and what they take.

A pipelined engine launches a step while the one before runs, so that the device never waits. What comes meanwhile has
to wait for both, and while a step is launched no other thread of the process runs, such as the one that sends tokens.
So the next one is chosen late: behind a step of prompts alone, which may take fifty milliseconds, and behind one of
decodes alone that takes longer than the host needs. A step that draws somebody's first token is concluded at once.
"""

from collections import deque
from typing import NamedTuple

from deployments.engine.execution.base import LaunchedStep
from deployments.engine.stats import EngineStats

# So long before a step ends the next one is chosen, and its first kernels are launched; the others follow as they run.
_LEAD_S = 0.005
# Likewise if it decodes alone: what follows is most likely a graph, launched within 0.4 ms (p50), 1.9 (p99).
_DECODE_LEAD_S = 0.0025
# Of what a step is expected to take: longer contexts take longer, and waiting too long leaves the device idle.
_SURE_SHARE = 0.9
# The least seconds that were seen, per token of a prompt or of a step of decodes, are forgotten so much with each step.
_FORGOTTEN = 1.02
# Whether a step has ended is looked at so often.
_GLANCE_S = 0.002


class Taken(NamedTuple):
    """What a step took.

    Attributes:
        seconds: from the end of the one before.
        is_alone: nothing was under way when it was launched.
    """

    seconds: float
    is_alone: bool


class Pace:
    """See the module. Of two steps that overlap the second begins as the first ends.

    Args:
        stats: of the engine; steps with prompts are noted there.
    """

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats
        self._under_way: deque[tuple[float, LaunchedStep, bool]] = deque()
        self._ended_s = 0.0
        self._token_s = 0.0  # of a prompt, the least seen; 0: none
        self._decode_s = 0.0  # of a step of decodes alone, likewise

    def begin(self, step: LaunchedStep, begun_s: float) -> None:
        """A step was launched, which was prepared from `begun_s` on."""
        self._under_way.append((begun_s, step, not self._under_way))

    def end(self, now_s: float) -> Taken:
        """The step that was begun first has ended."""
        begun_s, step, is_alone = self._under_way.popleft()
        seconds = now_s - max(begun_s, self._ended_s)
        if num_tokens := step.num_prompt_tokens:
            # All three at once: whoever learns what a step costs must not see the tokens of one without its time.
            self._stats.prompt_tokens += num_tokens
            self._stats.prefill_steps += 1
            self._stats.prefill_s += seconds
            self._token_s = _least(self._token_s, seconds / num_tokens)
        else:
            self._decode_s = _least(self._decode_s, seconds)
        self._ended_s = now_s
        return Taken(seconds, is_alone)

    def pause_s(self, now_s: float) -> float:
        """Seconds for which nothing needs to be chosen, since the device has work until then; ask again after them."""
        if len(self._under_way) != 1:
            return 0.0
        begun_s, step, _ = self._under_way[0]
        if step.done is None or step.done.query():
            return 0.0
        left_s = max(begun_s, self._ended_s) + self._hold_s(step) - now_s
        return min(_GLANCE_S, max(0.0, left_s))

    def _hold_s(self, step: LaunchedStep) -> float:
        """From the beginning of a step until the next one is chosen."""
        if not step.num_prompt_tokens:
            return self._decode_s * _SURE_SHARE - _DECODE_LEAD_S
        return step.num_prompt_tokens * self._token_s * _SURE_SHARE - _LEAD_S if _has_prompts_alone(step) else 0.0


def _least(so_far: float, seen: float) -> float:
    """Of what was seen, the older the less it counts."""
    return min(seen, so_far * _FORGOTTEN) if so_far else seen


def is_awaited(step: LaunchedStep) -> bool:
    """Whether somebody's first token comes of it, which the launching of another step would hold up."""
    return _has_prompts_alone(step) and any(item.num_draws for item in step.items)


def _has_prompts_alone(step: LaunchedStep) -> bool:
    return not any(item.is_decode for item in step.items)
