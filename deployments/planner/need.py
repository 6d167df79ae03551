"""How many engines a load needs to keep the bounds in its tail. Pure functions of numbers.

**Prompts.** Work comes at `a` engines' worth per second, unevenly: its variance per second is `v`. What waits for `c`
engines is taken to be V, whose tail falls as exp(-2 (c - a) V / v), and the wait is V / c. So the share 1 - quantile
waits longer than `t` with as many engines as solve `c (c - a) = v ln(1 / (1 - quantile)) / (2 t)`.

**Answers.** The batch of an engine is bounded: by the gap between tokens, by seats, by KV blocks. The sequences that
run at once are the rate times what an answer takes (Little's law), and vary as if each came and went by chance, by as
much more as arrivals are more uneven than chance. Prompts that the same engines compute take their part of the time.

**What waits.** More engines than that are needed while more waits than can be computed within the bound, unless those
that are there, and those that start, will have done it before another has started. A prompt for the prefill pool waits
for two pools: for a seat that decode keeps for it, and then for its turn. It is counted by the one that holds it up:
prefill, where what its engines have is late already; else decode.

Source: heavy-traffic approximation of the G/G/c queue (Kingman 1962; Kollerstrom 1974); infinite-server approximation
of the many-server queue with peaked arrivals (Whitt 1992).
"""

import math
from dataclasses import dataclass, replace

from deployments.planner.flow import Rate
from deployments.planner.observation import Answers, PoolSeen, Prompts
from deployments.planner.settings import PlannerSettings

# No more than so much of an engine's time is planned for: what is left is for what the averages do not see.
_MAX_BUSY = 0.9
# Of the bound, that a step of the planned batch takes.
_GAP_SHARE = 0.9
# Of the KV pool, that running sequences are to hold.
_MAX_KV_USE = 0.85
# What runs may be planned to become so many times as much.
_GROWTH = 4.0
# Of the bound: what waits longer is late if anything goes wrong.
_LATE = 0.5
# Of the bound, that is left to wait however long prompts themselves take.
_LEAST_WAIT_SHARE = 0.25


# Engines' worth of prompts that decode engines compute beside their sequences, where there may be no prefill engine.
_LEAST_WORK = 0.1


@dataclass(frozen=True, slots=True)
class Need:
    """Engines.

    Attributes:
        lasting: for what comes, with its unevenness: not whole.
        careful: the same if as much comes as chance may have hidden; a replica is removed by this one alone.
        burst: for what has come and waits.
        why: in words.
    """

    lasting: float
    careful: float
    burst: float
    why: str

    @property
    def num_engines(self) -> int:
        """Whole ones, for now."""
        return _whole(max(self.lasting, self.burst))

    @property
    def num_careful(self) -> int:
        """Whole ones, below which one does not go."""
        return _whole(max(self.careful, self.burst))

    def times(self, factor: float) -> "Need":
        """Where engines turn out to do less than is thought."""
        return Need(self.lasting * factor, self.careful * factor, self.burst, self.why)


def _whole(engines: float) -> int:
    return math.ceil(engines - 1e-9)


def prompt_engines(work: float, variance: float, wait_s: float, quantile: float) -> float:
    """Engines for work that comes, so that the wait keeps a bound; see the module.

    Args:
        work: engines' worth per second.
        variance: of that, per second.
        wait_s: the bound.
        quantile: share that is to keep it.
    """
    if work <= 0:
        return 0.0
    spread = variance * math.log(1.0 / (1.0 - quantile)) / (2.0 * wait_s)
    return max(work / _MAX_BUSY, (work + math.sqrt(work * work + 4.0 * spread)) / 2.0)


def need_of_prompts(prompts: Prompts, seen: PoolSeen, num_starting: int, settings: PlannerSettings) -> Need:
    """Engines that compute prompts for others."""
    if not prompts.token_s:
        return _unmeasured(prompts.queued_tokens > 0, "no prompt was measured yet")
    work = prompts.work
    is_late = is_behind(prompts, seen.num_ready, settings)
    # That the rate has risen is believed sooner where a queue shows it as well.
    now = max(work.now, work.fast) if is_late else work.now
    # The prompts that most of the work is of; for single arrivals at random it is exactly their mean, by tokens.
    own_s = min(work.variance / work.slow, settings.ttft_s) if work.slow > 0 else 0.0
    wait_s = max(settings.ttft_s - own_s, _LEAST_WAIT_SHARE * settings.ttft_s)

    def engines(rate: float) -> float:
        return prompt_engines(rate, work.variance, wait_s, settings.quantile)

    burst = _burst(prompts.queued_s, now, seen, num_starting, settings.ttft_s) if is_late else 0.0
    why = (
        f"{now:.2f} engines' worth of prompts come ({work.slow:.2f} over a while), {prompts.queued_s:.1f} s of them "
        f"wait, the first for {prompts.oldest_s:.1f} s; {settings.quantile:.0%} within {settings.ttft_s:g} s need "
        f"{engines(now):.2f}"
    )
    return Need(engines(now), engines(_careful(work)), burst, why)


def is_behind(prompts: Prompts, num_ready: int, settings: PlannerSettings) -> bool:
    """Whether what the engines of a pool have takes so long that some of it is late."""
    return prompts.held_s > _LATE * settings.ttft_s * max(1, num_ready)


def unless_decode_can(need: Need, prompts: Prompts) -> Need:
    """What prompts need, where there may be no engine for them: none for so few that decode hardly notices them."""
    return replace(
        need,
        lasting=need.lasting if prompts.work.now >= _LEAST_WORK else 0.0,
        careful=need.careful if _careful(prompts.work) >= _LEAST_WORK else 0.0,
        burst=need.burst if prompts.token_s else 0.0,  # before decode has computed any, nothing is known of them
    )


def unless_idle(need: Need, answers: Answers, num_starting: int, num_flipped: int) -> Need:
    """What answers need, where there may be no engine for them: none while nobody is there, nor came a moment ago.

    That is no forecast: what comes next is held until an engine has started, and what was needed is kept for a while.
    One that is starting is awaited: an ingress may wait for it, and to give it up and begin anew would help nobody.
    """
    if num_flipped or not answers.is_idle:
        why = f"{answers.num_held} requests are held until an engine is there; " * bool(answers.num_held)
        return replace(need, why=why + need.why)
    if num_starting:
        return Need(1.0, 1.0, 0.0, "nobody is there, but an engine is starting")
    return Need(0.0, 0.0, 0.0, "nobody is there, and nobody comes")


def need_of_answers(
    answers: Answers, seen: PoolSeen, num_starting: int, settings: PlannerSettings, *, awaits_prefill: bool = False
) -> Need:
    """Engines that generate, and compute those prompts that are theirs.

    Args:
        answers: of the pool.
        seen: the pool.
        num_starting: engines that will be there.
        settings: what is to be kept.
        awaits_prefill: the prefill pool holds its prompts up, so that more seats are of no use to these.
    """
    prompts = seen.prompts
    if answers.gaps is None or not answers.output_tokens:
        return _unmeasured(answers.num_running + answers.num_waiting > 0, "no answer was measured yet")
    batch = largest_batch(answers, seen.num_ready, settings)
    answer_s = answers.output_tokens * answers.gaps.seconds(batch)
    requests = answers.requests
    own = need_of_prompts(prompts, seen, num_starting, settings) if prompts.work.slow > 0 else _unmeasured(False, "")

    def engines(rate: float) -> float:
        sequences = rate * answer_s
        uneven = max(1.0, requests.variance / requests.slow) if requests.slow > 0 else 1.0
        spread = _sigmas(settings.quantile) * math.sqrt(sequences * uneven)
        return (sequences + spread) / batch

    running = _running(answers, seen.num_ready, batch, settings.itl_s)
    # What comes and what it grows to are of different times: only so many times what is there is believed at once.
    most = _GROWTH * (running + (answers.num_waiting + answers.num_reserved) / batch) + 1.0
    lasting = min(engines(requests.now), most) + own.lasting
    careful = min(engines(_careful(requests)), most) + own.careful
    num_held_up = answers.num_for_prefill if awaits_prefill else 0
    num_open = answers.num_running + answers.num_waiting - num_held_up
    num_open += 0 if awaits_prefill else answers.num_reserved
    start_s = seen.start_s if seen.num_ready else 0.0  # nobody ends while there is no engine
    waiting = _open_after(num_open, requests.now * answer_s, answer_s, start_s) / batch
    burst = max(own.burst, running, waiting if answers.num_waiting > num_held_up else 0.0)
    why = (
        f"{requests.now:.2f} requests/s ({requests.slow:.2f} over a while) of {answers.output_tokens:.0f} tokens, "
        f"at most {batch:.0f} at once in an engine (gap {answers.gaps.seconds(batch):.3f} s), "
        f"{answers.num_running} run, {answers.num_waiting} wait; "
        f"{settings.quantile:.0%} within {settings.itl_s:g} s need {lasting:.2f}"
    )
    if own.lasting >= 0.005:
        why += f", of which {own.lasting:.2f} compute prompts"
    return Need(lasting, careful, burst, why)


def largest_batch(answers: Answers, num_ready: int, settings: PlannerSettings) -> float:
    """Sequences that an engine may run at once."""
    assert answers.gaps is not None
    batch = min(float(answers.max_seqs), answers.gaps.batch_within(_GAP_SHARE * settings.itl_s))
    if (num_seated := answers.num_running + answers.num_reserved) and answers.kv_use > 0:
        per_engine = num_seated / max(1, num_ready)
        batch = min(batch, per_engine * _MAX_KV_USE / answers.kv_use)
    return max(1.0, batch)


def _careful(rate: Rate) -> float:
    return max(rate.now, rate.slow + 3.0 * rate.slow_error)


def _burst(queued_s: float, work: float, seen: PoolSeen, num_starting: int, bound_s: float) -> float:
    """Engines so that what waits is done in time, once another has started; 0: it will be done before."""
    if not seen.num_ready:  # nobody computes anything until they start, however many
        return work + queued_s / (bound_s + seen.start_s)
    num_ready = seen.num_ready
    left_s = queued_s - max(0.0, num_ready + num_starting - work) * seen.start_s
    return work + left_s / (bound_s + seen.start_s) if left_s > 0 else 0.0


def _running(answers: Answers, num_ready: int, batch: float, bound_s: float) -> float:
    """Engines for those that run, in batches of which the gap keeps the bound.

    As many tokens per second as now; or, where batches are too large already, so that they pile up, or it is not known
    what a step takes of its own, so that engines seem to have no time left, for all of them.
    """
    assert answers.gaps is not None
    now_s = answers.gaps.seconds(answers.num_running / max(1, num_ready))
    if now_s > bound_s or not answers.gaps.step_s:
        return answers.num_running / batch
    return answers.num_running * answers.gaps.seconds(batch) / now_s / batch if now_s > 0 else 0.0


def _open_after(now: int, lasting: float, answer_s: float, start_s: float) -> float:
    """Sequences that will be there once another engine has started, if all that are there have a seat."""
    return lasting + (now - lasting) * math.exp(-start_s / answer_s) if answer_s > 0 else now


def _sigmas(quantile: float) -> float:
    """Of a normal distribution; to a hundredth between 0.5 and 0.9999 (Abramowitz and Stegun, 26.2.23)."""
    t = math.sqrt(-2.0 * math.log(1.0 - quantile))
    return max(
        0.0, t - (2.515517 + 0.802853 * t + 0.010328 * t * t) / (1 + 1.432788 * t + 0.189269 * t * t + 0.001308 * t**3)
    )


def _unmeasured(is_wanted: bool, why: str) -> Need:
    """Nothing is known of speeds: one engine, if there is anything to do."""
    engines = 1.0 if is_wanted else 0.0
    return Need(engines, engines, engines, why)
