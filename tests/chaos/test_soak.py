"""What a service gathers: memory that rises is told from memory that only varies, and counts from what they were."""

import numpy as np
import pytest

from tests.bench.soak.processes import Usage, role_of
from tests.bench.soak.verdict import NUM_STRETCHES, SPARE_FDS, SPARE_THREADS, Idle, find_leaks, fit_trend, fit_trends

MIB = 2**20
TIMES_S = [5.0 * i for i in range(240)]


def usage(pid=1, role="engine", at_s=0.0, rss=100 * MIB, threads=8, fds=20):
    return Usage(pid, role, at_s, rss, rss, 0, 0, threads, fds)


def test_a_line_is_found_exactly():
    trend = fit_trend(TIMES_S, [100 * MIB + 30 * MIB * at_s / 3600 for at_s in TIMES_S])
    assert trend.mib_per_hour == pytest.approx(30)
    assert trend.error == pytest.approx(0, abs=1e-6)
    assert not trend.is_flat(max_mib_per_hour=10)
    assert trend.is_flat(max_mib_per_hour=31)


def test_the_interval_holds_the_slope_in_nineteen_of_twenty_runs():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        noise = rng.normal(0, 2 * MIB, len(TIMES_S))
        low, high = fit_trend(
            TIMES_S, [100 * MIB + 12 * MIB * t / 3600 + n for t, n in zip(TIMES_S, noise, strict=True)]
        ).interval
        held += low <= 12 <= high
    assert 0.92 < held / 400 < 0.98


def test_memory_that_only_varies_or_falls_is_flat():
    rng = np.random.default_rng(2)
    assert fit_trend(TIMES_S, list(100 * MIB + rng.normal(0, MIB, len(TIMES_S)))).is_flat(1.0)
    assert fit_trend(TIMES_S, [200 * MIB - MIB * t for t in TIMES_S]).is_flat(1.0)


def test_a_trend_takes_enough_samples():
    with pytest.raises(ValueError, match=f"at least {NUM_STRETCHES}"):
        fit_trend(TIMES_S[:19], [1.0] * 19)


def test_only_processes_that_lived_throughout_have_a_trend():
    samples = [usage(pid=1, at_s=at_s) for at_s in TIMES_S] + [usage(pid=2, at_s=at_s) for at_s in TIMES_S[:30]]
    assert list(fit_trends(samples, lambda one: one.rss_bytes)) == ["engine 1"]


def test_what_is_about_as_before_or_less_is_no_leak():
    before = Idle((usage(threads=8, fds=20), usage(pid=2, role="worker")), 5, {})
    assert list(find_leaks(before, before)) == []
    assert list(find_leaks(before, Idle((usage(threads=8 + SPARE_THREADS, fds=20 + SPARE_FDS),), 5, {}))) == []
    assert list(find_leaks(before, Idle((usage(threads=7, fds=20), usage(pid=3, role="worker")), 4, {}))) == []


class Named:
    """What `role_of` looks at of a process."""

    def __init__(self, name, *command):
        self.name, self.cmdline = (lambda: name), (lambda: list(command))


def test_a_worker_is_one_before_it_has_a_title_too():
    workers = "/lib/ray/_private/workers"
    assert role_of(Named("python", "/bin/python", f"{workers}/default_worker.py", "--node-ip-address=1")) == "worker"
    assert (
        role_of(Named("python", "/bin/python", f"{workers}/setup_worker.py", f"{workers}/default_worker.py"))
        == "worker"
    )
    assert role_of(Named("ray::IDLE", "ray::IDLE")) == "worker"
    assert role_of(Named("python", "/bin/python", "/x/agent.py")) == "agent"


@pytest.mark.parametrize(
    ("after", "leak"),
    [
        (Idle((usage(threads=17),), 5, {}), "engine 1 has 17 threads, 8 before"),
        (Idle((usage(fds=29),), 5, {}), "engine 1 has 29 file descriptors, 20 before"),
        (Idle((usage(),), 6, {}), "6 actors, 5 before"),
        (Idle((usage(),), 5, {"decode a": {"kv_blocks_used": 2.0}}), "decode a holds {'kv_blocks_used': 2.0}"),
        (Idle((usage(), usage(pid=2)), 5, {}), "engine 2 is new"),
        (Idle((), 5, {}), "engine 1 is gone"),
    ],
)
def test_each_thing_that_there_is_more_of_is_a_leak(after, leak):
    assert list(find_leaks(Idle((usage(),), 5, {}), after)) == [leak]
