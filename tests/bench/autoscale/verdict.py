"""What of a run is told, and what is asked of it. Pure: knows what was seen, and not how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.autoscale.watch import Moment


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the load.

    Attributes:
        name: of it.
        seconds: it lasts.
        prompts: times as many tokens as otherwise in each prompt.
        answers: the same of answers.
    """

    name: str
    seconds: float
    prompts: float = 1.0
    answers: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """A phase in which one pool has more to do.

    Attributes:
        pool: that one.
        begins_s: the phase.
        ends_s: likewise.
    """

    pool: str
    begins_s: float
    ends_s: float


@dataclass(frozen=True, slots=True)
class Reaction:
    """How a pool followed a step. Times in seconds, None: it never did.

    Attributes:
        pool: of the step.
        target_s: from its beginning until more replicas were wanted.
        node_s: until another node was there.
        replica_s: until another replica served.
        most_replicas: that served at once, from then on.
        most_nodes: that were there at once.
        fewer_target_s: from its end until no more than the least were wanted, for good.
        fewer_replicas_s: until no more were there.
        fewer_nodes_s: until no more nodes were there than that.
        of_others: nodes of the other type that were started in it.
    """

    pool: str
    target_s: float | None
    node_s: float | None
    replica_s: float | None
    most_replicas: int
    most_nodes: int
    fewer_target_s: float | None
    fewer_replicas_s: float | None
    fewer_nodes_s: float | None
    of_others: int


def steps_of(phases: Sequence[Phase]) -> list[Step]:
    """The phases in which there is more of prompts, or of answers."""
    found, at_s = [], 0.0
    for phase in phases:
        for pool, factor in (("prefill", phase.prompts), ("decode", phase.answers)):
            if factor > 1:
                found.append(Step(pool, at_s, at_s + phase.seconds))
        at_s += phase.seconds
    return found


def react(step: Step, moments: Sequence[Moment], least: int) -> Reaction:
    """How the pool of a step followed it.

    Args:
        step: the one.
        moments: of the whole run.
        least: replicas and nodes of each pool where there is little to do.
    """
    pool, since = step.pool, [moment for moment in moments if moment.at_s >= step.begins_s]

    def begins(count: Callable[[Moment], int]) -> float | None:
        return next((moment.at_s - step.begins_s for moment in since if count(moment) > least), None)

    def ends(count: Callable[[Moment], int]) -> float | None:
        if not since or count(since[-1]) > least:
            return None
        last_s = max((moment.at_s for moment in since if count(moment) > least), default=step.ends_s)
        return max(0.0, last_s - step.ends_s)

    def target(moment: Moment) -> int:
        return moment.targets[pool]

    def replicas(moment: Moment) -> int:
        return moment.replicas[pool]

    def nodes(moment: Moment) -> int:
        return moment.nodes[pool]

    return Reaction(
        pool,
        begins(target),
        begins(nodes),
        begins(replicas),
        max(map(replicas, since), default=0),
        max(map(nodes, since), default=0),
        ends(target),
        ends(replicas),
        ends(nodes),
        sum(_started(other, step, moments) for other in ("prefill", "decode") if other != pool),
    )


def _started(pool: str, step: Step, moments: Sequence[Moment]) -> int:
    """Nodes of a type that came in a step."""
    before = [moment.started[pool] for moment in moments if moment.at_s < step.begins_s]
    by_its_end = [moment.started[pool] for moment in moments if moment.at_s < step.ends_s]
    return (by_its_end[-1] if by_its_end else 0) - (before[-1] if before else 0)


def problems(reactions: Sequence[Reaction], num_lost: int) -> list[str]:
    """What is asked and was not so, in words; none: all is well."""
    found = [f"{num_lost} requests were lost, 0 may be"] if num_lost else []
    for reaction in reactions:
        pool = reaction.pool
        if reaction.node_s is None or reaction.replica_s is None:
            found.append(f"more to do for {pool} brought no more of its nodes or replicas")
        if reaction.of_others:
            found.append(f"more to do for {pool} started {reaction.of_others} nodes of the other type, 0 may be")
        if None in (reaction.fewer_target_s, reaction.fewer_replicas_s, reaction.fewer_nodes_s):
            found.append(f"{pool} did not go back to its least")
    return found
