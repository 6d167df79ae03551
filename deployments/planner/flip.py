"""Decides how many decode replicas compute prompts for others, and which. Pure functions.

A replica that flips keeps its weights, so it helps within seconds, where one that starts takes minutes or gets no node.
Decode lends what it would give up anyway: replicas that it would remove. Where prefill can get no others it lends all
that it has not needed for some seconds, for they are back as soon. They go back when decode needs them, or once prefill
needs fewer: before any prefill replica is removed. One decode replica always decodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from deployments.engine.stats import EngineStats


@dataclass(frozen=True, slots=True)
class Side:
    """Replicas that do the work of one pool.

    Attributes:
        ready: there are so many, flipped ones counted by what they do.
        need: so many are needed now.
        held: so many were, lately; at least `need`. Of prefill for as long as a replica is kept, of decode as `Lent`
            in `state.py` has it.
    """

    ready: int
    need: int
    held: int


@dataclass(frozen=True, slots=True)
class Lack:
    """How prefill gets more replicas of its own.

    Attributes:
        seconds: for which it has had fewer than it needs.
        start_s: that one takes to start.
        may_come: some start, or may be started.
    """

    seconds: float
    start_s: float
    may_come: bool

    @property
    def is_lasting(self) -> bool:
        """There is none to wait for: those that start should be there by now."""
        return not self.may_come or self.seconds > self.start_s


def num_flipped(now: int, prefill: Side, decode: Side, num_removable: int, lack: Lack) -> int:
    """How many decode replicas are to compute prompts.

    Args:
        now: so many do.
        prefill: both kinds that compute prompts.
        decode: those that decode.
        num_removable: decode replicas that would be removed now.
        lack: of prefill replicas.
    """
    now = max(0, min(now, now + decode.ready - 1))
    if (num_missed := decode.need - decode.ready) > 0:
        return max(0, now - num_missed)
    if (num_spare := prefill.ready - prefill.held) > 0:
        return max(0, now - num_spare)
    num_idle = decode.ready - max(1, decode.held)
    num_lent = num_idle if lack.is_lasting else min(num_idle, num_removable)
    return now + max(0, min(prefill.need - prefill.ready, num_lent))


def describe(before: int, count: int, prefill: Side, decode: Side, lack: Lack) -> str:
    """What was decided, and why; empty where there is nothing to say."""
    if count == before:
        return f". {count} of decode compute prompts" if count else ""
    if count > before:
        starts = f"has lacked some for {lack.seconds:.0f} s" if lack.may_come else "may have no more"
        why = f"prefill needs {prefill.need}, has {prefill.ready} and {starts}"
    elif decode.need > decode.ready:
        why = f"decode needs {decode.need} and has {decode.ready}"
    else:
        why = f"prefill needs {prefill.held} and has {prefill.ready}"
    return f". {before} to {count} of decode compute prompts: {why}"


def choose_flipped(flipped: frozenset[str], engines: Mapping[str, EngineStats], count: int) -> frozenset[str]:
    """Which replicas compute prompts: as few changes as can be, of those that have least to do.

    Args:
        flipped: those that do.
        engines: all of the decode deployment, by name; those that are not among them are gone.
        count: so many are to.
    """
    known = sorted(flipped & engines.keys(), key=lambda name: (-engines[name].num_queued_prompt_tokens, name))
    others = sorted(engines.keys() - flipped, key=lambda name: (_num_sequences(engines[name]), name))
    return frozenset([*known, *others][:count])


def _num_sequences(engine: EngineStats) -> int:
    return engine.num_waiting + engine.num_reserved + engine.num_running
