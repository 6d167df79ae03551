"""Builds samples and runs by hand, and whole synthetic runs that look like a deployment under load."""

import random
from collections.abc import Iterable

from load_tests.samples import GeneratorHealth, Run, Sample

WARMUP_S = 10.0
DURATION_S = 20.0


def build_sample(
    request_class: str = "chat",
    sent_s: float = WARMUP_S,
    ttft_s: float | None = 0.5,
    gaps_s: Iterable[float] = (0.1, 0.1),
    error: str | None = None,
    prompt_tokens: int = 40,
) -> Sample:
    """One request of a session of its own; its tokens are the first and one per gap."""
    gaps = tuple(gaps_s)
    return Sample(
        request_class=request_class,
        session=f"{request_class}-{sent_s}",
        turn=0,
        planned_s=sent_s,
        sent_s=sent_s,
        ttft_s=ttft_s,
        gaps_s=gaps,
        end_s=sent_s + (ttft_s or 0.0) + sum(gaps),
        prompt_tokens=prompt_tokens,
        output_tokens=0 if ttft_s is None else 1 + len(gaps),
        error=error,
    )


def build_run(
    samples: Iterable[Sample] = (),
    deployment: str = "colocated",
    load: float = 1.0,
    round: int = 0,
    problems: Iterable[str] = (),
    warmup_s: float = WARMUP_S,
    duration_s: float = DURATION_S,
    server: dict[str, float] | None = None,
) -> Run:
    """One run; with problems it is invalid."""
    return Run(
        scenario="mixed",
        deployment=deployment,
        url="http://127.0.0.1:8000",
        load=load,
        round=round,
        started_at="2026-03-01T12:00:00+00:00",
        warmup_s=warmup_s,
        duration_s=duration_s,
        samples=tuple(samples),
        generator=GeneratorHealth(
            {"p50": 0.0004, "p99": 0.002, "max": 0.011}, {"driver": 0.12, "client-0": 0.31}, tuple(problems)
        ),
        server={} if server is None else server,
    )


def synthetic_run(
    deployment: str = "colocated",
    load: float = 1.0,
    round: int = 0,
    problems: Iterable[str] = (),
    *,
    stall_s: float = 0.8,
    warmup_s: float = WARMUP_S,
    duration_s: float = DURATION_S,
) -> Run:
    """Chat streams with a stall at each arrival of a long prompt; every fourth long prompt fails."""
    schedule = random.Random(f"{load} {round}")
    rng = random.Random(f"{deployment} {load} {round}")
    long_times = _arrivals(schedule, 0.25 * load, warmup_s + duration_s)
    samples = [
        build_sample("long", at, 1.2 * rng.lognormvariate(0.2 * load, 0.3), [0.06] * 15, None, 1500)
        if index % 4 != 3
        else build_sample("long", at, None, [], "timeout", 1500)
        for index, at in enumerate(long_times)
    ]
    for at in _arrivals(schedule, 0.6 * load, warmup_s + duration_s):
        ttft_s = 0.15 * rng.lognormvariate(0.0, 0.4)
        samples.append(build_sample("chat", at, ttft_s, _stalled(rng, at + ttft_s, long_times, stall_s)))
    samples.sort(key=lambda sample: sample.start_s)
    server = {"kv_transferred_bytes": 1.5e9 if stall_s < 0.5 else 0.0, "preemptions": float(rng.randrange(3))}
    return build_run(samples, deployment, load, round, problems, warmup_s, duration_s, server)


def _arrivals(rng: random.Random, rate_per_s: float, end_s: float) -> list[float]:
    times = [rng.expovariate(rate_per_s)]
    while times[-1] < end_s:
        times.append(times[-1] + rng.expovariate(rate_per_s))
    return times[:-1]


def _stalled(rng: random.Random, now: float, stalls: list[float], stall_s: float) -> list[float]:
    gaps = []
    for _ in range(80):
        gap = 0.06 * rng.lognormvariate(0.0, 0.15)
        if any(now <= at < now + gap for at in stalls):
            gap += stall_s * rng.uniform(0.7, 1.3)
        now += gap
        gaps.append(gap)
    return gaps
