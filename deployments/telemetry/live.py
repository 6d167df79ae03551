"""What the live page and `make status` show: one JSON document of the service as it is and as its last minutes were.

Made when somebody asks, of what `history.py` has added up; pure. docs/live-page.md says what each figure means.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deployments.engine.stats import LATENCY_BUCKETS_S
from deployments.load.reading import DECODE, PREFILL
from deployments.planner.shared import Decision
from deployments.replica_stats import Computed
from deployments.telemetry.history import (
    NUM_SLOTS,
    PROMPTS,
    SLOT_S,
    ClientHistory,
    ClientSlot,
    History,
    KnownReplica,
    Slot,
)

# Figures without a curve are of so long; a point of a curve of latencies is of so many slots.
WINDOW_S = 300.0
_SLOTS_OF_POINT = 6
# An engine answers between two of its steps, and is asked once a second.
SILENT_S = 3.0
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_LOWER = np.array([0.0, *LATENCY_BUCKETS_S])
_UPPER = np.array([*LATENCY_BUCKETS_S, LATENCY_BUCKETS_S[-1]])
_NOBODY = ClientSlot()

if TYPE_CHECKING:
    from numpy.typing import NDArray

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What is not in the history.

    Attributes:
        model: its name in the API.
        mode: `disaggregated` or `colocated`.
        version: of kvrelay.
        health: whether the service can serve, and why not; whoever asks for the document knows it last.
        states: by pool, how many replicas Ray Serve has in which state; empty: it does not say.
        num_ingresses: replicas of the ingress that there are.
        is_planned: the planner is on.
        decisions: of the planner, the last one at the end.
        may_sleep: there may be no decode replica until a request comes.
    """

    model: str
    mode: str
    version: str
    health: tuple[bool, str] = (True, "")
    states: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    num_ingresses: int = 1
    is_planned: bool = False
    decisions: Sequence[Decision] = ()
    may_sleep: bool = False


class Past:
    """What slots say that have ended, which is most of a document: the same until another one ends."""

    def __init__(self) -> None:
        self._known: Hashable = None
        self._parts: Json = {}

    def parts(
        self, history: History, others: Sequence[ClientHistory], pools: tuple[str, ...], now_s: float
    ) -> Mapping[str, object]:
        """Those parts of a document; see `describe`."""
        last, newest = _last_ended(history, now_s), [each.number for each in list(history.slots)[-1:]]
        known = (last, *newest, pools, *((other.replica, max(other.slots, default=0)) for other in others))
        if known != self._known:
            self._parts = _look_back(history, _merged_clients([history.clients(), *others]), pools, last)
            self._known = known
        return self._parts


def describe(
    state: ServiceState,
    history: History,
    others: Sequence[ClientHistory],
    now_s: float,
    past: Past | None = None,
) -> Json:
    """The document, as `sse.to_json` takes it.

    Args:
        state: see there.
        history: of the ingress replica that answers.
        others: what the clients of the other ingress replicas saw, as far as they answered.
        now_s: Unix time.
        past: of the document before.
    """
    pools = _pools_of(state)
    is_serving, reason = state.health
    return {
        "at_s": now_s,
        "model": state.model,
        "mode": state.mode,
        "version": state.version,
        "health": {
            "status": "ok" if is_serving else "unavailable",
            "reason": _sleep(state, history) if is_serving else reason,
        },
        "ingresses": {"asked": max(state.num_ingresses, 1 + len(others)), "answered": 1 + len(others)},
        "pools": {pool: _pool(pool, history, state, now_s) for pool in pools},
        "planner": {"is_on": state.is_planned, "decisions": list(state.decisions)},
        "events": list(history.events),
        **(past or Past()).parts(history, others, pools, now_s),
    }


def _look_back(history: History, clients: Mapping[int, ClientSlot], pools: Sequence[str], last: int) -> Json:
    first = last + 1 - round(WINDOW_S / SLOT_S)
    recent = [slot for slot in history.slots if slot.number >= first]
    seen = [told for number, told in clients.items() if number >= first]
    done = _total(recent)
    seconds = sum(slot.seconds for slot in recent)
    return {
        "window_s": seconds,
        "latency": {
            "ttft_s": quantiles(_merged([told.ttft for told in seen])),
            "itl_s": quantiles(_merged([told.itl for told in seen])),
        },
        "tokens": _tokens(done, seconds),
        "prompts": _prompts(done),
        "handoff": _handoff(done, seconds),
        "refusals": _refusals(seen),
        "history": _curves(history, clients, pools, last),
    }


def _sleep(state: ServiceState, history: History) -> str:
    """What there is to say of a service that can serve, and has nobody yet who does; else nothing."""
    if not state.may_sleep or history.replicas.get(DECODE, True):
        return ""
    is_starting = bool(state.states.get(DECODE, {}).get("STARTING"))
    return "a decode replica is starting" if is_starting else "no decode replica runs, the next request starts one"


def _merged_clients(parts: Iterable[ClientHistory]) -> dict[int, ClientSlot]:
    merged: dict[int, ClientSlot] = {}
    for part in parts:
        for number, told in part.slots.items():
            merged[number] = merged[number].plus(told) if number in merged else told
    return merged


def quantiles(counts: Sequence[int]) -> Json:
    """Of values in the buckets of `LATENCY_BUCKETS_S`, and how many there are; see `quantiles_of_rows`."""
    row = np.array([counts], dtype=np.int64)
    return {"count": int(row.sum())} | {name: values[0] for name, values in quantiles_of_rows(row).items()}


def quantiles_of_rows(rows: "NDArray[np.int64]") -> dict[str, list[float | None]]:
    """Of each row its quantiles; None: nothing was counted.

    Values are taken to lie evenly in their bucket, as Prometheus takes them, those of the last one at its lower end.

    Args:
        rows: (N, buckets) counts.
    """
    up_to = rows.cumsum(axis=1)
    totals, each = up_to[:, -1], np.arange(len(rows))
    below = np.hstack([np.zeros((len(rows), 1), dtype=np.int64), up_to])
    found: dict[str, list[float | None]] = {}
    for name, share in _QUANTILES.items():
        ranks = share * totals
        places = (up_to >= ranks[:, None]).argmax(axis=1)
        parts = (ranks - below[each, places]) / np.maximum(1, rows[each, places])
        values = _LOWER[places] + (_UPPER[places] - _LOWER[places]) * parts
        found[name] = [value if total else None for value, total in zip(values.tolist(), totals, strict=True)]
    return found


def _pools_of(state: ServiceState) -> tuple[str, ...]:
    return (DECODE,) if state.mode == "colocated" else (PREFILL, DECODE)


def _pool(pool: str, history: History, state: ServiceState, now_s: float) -> Json:
    replicas = [_replica(known, now_s) for _, known in sorted(history.replicas.get(pool, {}).items())]
    gone = [
        {"name": name, "state": "gone", "since_s": now_s - gone_s}
        for (of, name), gone_s in history.gone.items()
        if of == pool
    ]
    return {"replicas": [*replicas, *gone], "states": state.states.get(pool, {})}


def _replica(known: KnownReplica, now_s: float) -> Json:
    engine, silent_s = known.stats.engine, max(0.0, now_s - known.heard_s)
    is_silent = silent_s > SILENT_S
    return {
        "name": known.stats.replica,
        "state": "silent" if is_silent else "busy" if engine.num_running or engine.num_reserved else "idle",
        "since_s": silent_s,
        "queued_tokens": engine.num_queued_prompt_tokens,
        "num_waiting": engine.num_waiting,
        "num_reserved": engine.num_reserved,
        "num_running": engine.num_running,
        "max_running": engine.max_num_seqs,
        "kv_used_blocks": engine.num_used_blocks,
        "kv_exported_blocks": engine.num_exported_blocks,
        "kv_blocks": engine.num_blocks,
        "block_size": engine.block_size,
        "prompt_tokens_per_s": known.recent["prompt_tokens"] / SLOT_S,
        "generated_tokens_per_s": known.recent["generated_tokens"] / SLOT_S,
        "preemptions": engine.preemptions,
    }


def _total(slots: Iterable[Slot]) -> dict[str, Counter[str]]:
    """What each pool did in all of these."""
    total: dict[str, Counter[str]] = {PREFILL: Counter(), DECODE: Counter()}
    for slot in slots:
        for pool, of_pool in slot.pools.items():
            total[pool].update(of_pool.counts)
    return total


def _where(done: Mapping[str, Counter[str]]) -> dict[str, int]:
    """Tokens of prompts by where their KV came from."""
    prefill, decode = done[PREFILL], done[DECODE]
    tier = prefill["tier_hit_tokens"] + decode["tier_hit_tokens"]
    return {
        "decode_cache": decode["prefix_hit_tokens"] - decode["tier_hit_tokens"],
        "prefill_cache": decode["delta_hit_tokens"],
        "tier": tier,
        "prefill": prefill["prompt_tokens"],
        "decode": decode["prompt_tokens"],
    }


def _prompts(done: Mapping[str, Counter[str]]) -> Json:
    where = _where(done)
    total = sum(where.values())
    cached = total - where["prefill"] - where["decode"]
    prompts = {computed.value: done[DECODE][f"{PROMPTS}{computed.value}"] for computed in Computed}
    return {"tokens": where, "cached_share": cached / total if total else None, "computed_in": prompts}


def _tokens(done: Mapping[str, Counter[str]], seconds: float) -> Json:
    """Of prompts, found or computed, and of answers; their ratio is that of prefill to decode."""
    prompt = sum(_where(done).values())
    computed = sum(pool["prompt_tokens"] for pool in done.values())
    generated = sum(pool["generated_tokens"] for pool in done.values())
    return {
        "prompt": prompt,
        "computed": computed,
        "generated": generated,
        "ratio": prompt / generated if generated else None,
        "prompt_per_s": prompt / seconds if seconds else 0.0,
        "computed_per_s": computed / seconds if seconds else 0.0,
        "generated_per_s": generated / seconds if seconds else 0.0,
    }


def _handoff(done: Mapping[str, Counter[str]], seconds: float) -> Json:
    """KV went to the decode pool while its prompt was still computed (hidden), and after that (exposed)."""
    prefill = done[PREFILL]
    hidden_s, exposed_s = prefill["hidden_s"], prefill["exposed_s"]
    return {
        "requests": prefill["num_requests"],
        "failures": prefill["num_failures"],
        "bytes": prefill["num_bytes"],
        "per_s": prefill["num_requests"] / seconds if seconds else 0.0,
        "bytes_per_s": prefill["num_bytes"] / seconds if seconds else 0.0,
        "hidden_s": hidden_s,
        "exposed_s": exposed_s,
        "hidden_share": hidden_s / (hidden_s + exposed_s) if hidden_s + exposed_s else None,
    }


def _refusals(seen: Iterable[ClientSlot]) -> list[Json]:
    refused = sum((told.refusals for told in seen), Counter[tuple[str, str]]())
    return [
        {"reason": reason, "priority": priority, "count": count}
        for (reason, priority), count in sorted(refused.items())
    ]


def _merged(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(of_bucket) for of_bucket in zip(*counts, _NOBODY.ttft, strict=True)]


def _last_ended(history: History, now_s: float) -> int:
    """Number of the last slot that has ended."""
    last = int(now_s // SLOT_S) - 1
    is_late = history.slots and history.slots[-1].number == last - 1
    return last - 1 if is_late else last  # the next reading ends that one


def _curves(history: History, clients: Mapping[int, ClientSlot], pools: Sequence[str], last: int) -> dict[str, object]:
    """The same over time: one point for each slot up to the last that has ended; None where nothing was seen."""
    numbers = range(last - NUM_SLOTS + 1, last + 1)
    slots = {slot.number: slot for slot in history.slots}
    known = [slots.get(number) for number in numbers]
    curves: dict[str, object] = {
        "slot_s": SLOT_S,
        "ends_s": [(number + 1) * SLOT_S for number in numbers],
        "computed_per_s": [_rate(slot, "prompt_tokens") for slot in known],
        "generated_per_s": [_rate(slot, "generated_tokens") for slot in known],
    }
    for pool in pools:
        of_pool = [None if slot is None else slot.pools.get(pool) for slot in known]
        curves[f"{pool}_queued_tokens"] = [None if one is None else one.num_queued_tokens for one in of_pool]
        curves[f"{pool}_running"] = [None if one is None else one.num_running for one in of_pool]
        curves[f"{pool}_kv_use"] = [
            one.num_used_blocks / one.num_blocks if one is not None and one.num_blocks else None for one in of_pool
        ]
    for name in ("ttft", "itl"):
        told = quantiles_of_rows(_rolling([getattr(clients.get(number, _NOBODY), name) for number in numbers]))
        curves |= {f"{name}_{quantile}_s": values for quantile, values in told.items()}
    return curves


def _rolling(counts: Sequence[Sequence[int]]) -> "NDArray[np.int64]":
    """Of each slot and those just before it."""
    up_to = np.array(counts, dtype=np.int64).cumsum(axis=0)
    rolling = up_to.copy()
    rolling[_SLOTS_OF_POINT:] -= up_to[:-_SLOTS_OF_POINT]
    return rolling


def _rate(slot: Slot | None, name: str) -> float | None:
    if slot is None:
        return None
    return sum(of_pool.counts[name] for of_pool in slot.pools.values()) / slot.seconds
