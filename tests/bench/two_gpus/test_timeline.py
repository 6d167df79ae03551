"""What an engine records of its steps, and what the table makes of gaps whose reasons are known."""

import gc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.bench.two_gpus import bench_two_gpus
from tests.bench.two_gpus.timeline import COLUMNS, SENT, SENT_COLUMNS, STEPS, Recorder
from tests.bench.two_gpus.timeline_table import gaps_of, kinds_of, percentiles, read_rows, table_of
from tests.bench.two_gpus.turns import Turn
from tests.engine.driving import build_engine, hand_over
from tests.engine.families import load, random_prompt
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def forget_recorders() -> Iterator[None]:
    """They stay for as long as an engine's process."""
    before = list(gc.callbacks)
    yield
    gc.callbacks[:] = before


def test_a_step_is_recorded_with_the_chunks_that_arrived_before_it(tmp_path: Path) -> None:
    source, target = (build_engine(load("llama"), is_pipelined=True) for _ in range(2))
    Recorder(target, tmp_path / "decode-1")
    hand_over(source, target, [random_prompt(20, seed=1)], 6)
    path = (tmp_path / "decode-1").with_suffix(STEPS)
    # Six tokens, of which the prefill engine drew one; the last step is written with the one behind it.
    wait_until(lambda: path.exists() and path.stat().st_size >= 4 * 8 * len(COLUMNS))
    steps = read_rows(path, COLUMNS)
    assert steps["num_blocks"].tolist() == [3, 0, 0, 0]
    assert steps["num_activated"].tolist() == [1, 0, 0, 0]
    assert steps["max_context_tokens"].tolist() == [21, 22, 23, 24]
    assert steps["num_prompt_tokens"].tolist() == [0, 0, 0, 0]
    order = [steps[name] for name in COLUMNS[:6]]
    assert all((later >= earlier).all() for earlier, later in pairwise(order))
    # Pipelined: the next one was launched before a step was told.
    assert (steps["launched_s"][1:] <= steps["told_s"][:-1]).all()


def recorded(num_steps: int = 400) -> dict[str, np.ndarray]:
    """Steps of 5 ms on the device, each noticed 0.1 ms later, with what the host does meanwhile."""
    steps = {name: np.zeros(num_steps) for name in COLUMNS}
    steps["device_ms"] += 5.0
    steps["num_seqs"] += 32
    steps["num_rows"] += 32
    return steps


def in_order(steps: dict[str, np.ndarray], late_ms: np.ndarray) -> dict[str, np.ndarray]:
    """With the host's times, as they follow from the device's."""
    told = (np.cumsum(steps["idle_ms"] + steps["device_ms"]) + 0.1 + late_ms) / 1e3
    steps |= {"told_s": told, "concluded_s": told + 1e-4, "awaited_s": told - 4e-3}
    begun = np.concatenate(([0.0], told[:-1] - 3e-3))
    return steps | {"begun_s": begun, "launch_s": begun + 1e-4, "launched_s": begun + 4e-4}


def test_a_gap_is_taken_apart_into_what_made_it(tmp_path: Path) -> None:
    steps, late_ms = recorded(), np.zeros(400)
    steps["idle_ms"][100], steps["import_device_ms"][100], steps["num_blocks"][100] = 0.8, 0.7, 8
    steps["device_ms"][200], steps["max_context_tokens"][200] = 6.5, 8000
    late_ms[300] = 2.0
    gaps = gaps_of(in_order(steps, late_ms), min_seqs=16)
    assert gaps.gap == pytest.approx(sum(gaps.parts.values()))
    kinds = kinds_of(gaps)
    assert gaps.gap[kinds["8 blocks and more"]] == pytest.approx([5.8])
    assert gaps.parts["import"][kinds["8 blocks and more"]] == pytest.approx([0.7])
    assert gaps.gap[kinds["nothing arrived, one is long"]] == pytest.approx([6.5])
    assert gaps.gap[kinds["noticed late, 0.3 ms"]] == pytest.approx([7.0])
    assert gaps.late[kinds["noticed late, 0.3 ms"]] == pytest.approx([2.0])
    assert not kinds["device paused, 0.3 ms"].any()


def test_pauses_and_steps_of_few_are_no_gaps() -> None:
    steps = recorded()
    steps["num_seqs"][:50] = 1
    steps["idle_ms"][100] = 900.0
    steps = in_order(steps, np.zeros(400))
    steps["begun_s"][100] = steps["concluded_s"][99] + 0.9
    gaps = gaps_of(steps, min_seqs=16)
    assert len(gaps.gap) == 400 - 50 - 1
    assert gaps.gap == pytest.approx(5.0)


def test_a_gap_counts_for_each_sequence_that_waits() -> None:
    assert percentiles(np.array([9.0, 5.0]), np.array([1.0, 99.0]), (50, 99, 100)) == [5.0, 5.0, 9.0]


@pytest.mark.parametrize("has_device", [True, False])
def test_the_table_is_printed_with_and_without_a_device(tmp_path: Path, has_device: bool) -> None:
    steps = in_order(recorded(), np.zeros(400))
    if not has_device:
        steps |= {name: np.full(400, np.nan) for name in ("idle_ms", "device_ms", "import_device_ms")}
    path = tmp_path / f"decode-1{STEPS}"
    np.stack([steps[name] for name in COLUMNS], axis=1).tofile(path)
    np.tile([1.0, 1.001], (10, 1)).tofile(path.with_suffix(SENT))
    assert len(SENT_COLUMNS) == 2
    text = "\n".join(table_of(path))
    assert "nothing arrived, 32 rows" in text
    assert ("noticed behind the device" in text) is has_device
    assert "from the loop to the socket          1.00" in text


def test_what_was_recorded_is_kept_with_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded_at, results = tmp_path / "recorded", tmp_path / "results"
    recorded_at.mkdir()
    results.mkdir()
    monkeypatch.setattr(bench_two_gpus, "TIMELINES", recorded_at)
    monkeypatch.setattr(bench_two_gpus, "FLUSH_S", 0.0)
    steps = in_order(recorded(), np.zeros(400))
    np.stack([steps[name] for name in COLUMNS], axis=1).tofile(recorded_at / f"decode-1{STEPS}")
    np.tile([1.0, 1.001], (10, 1)).tofile(recorded_at / f"decode-1{SENT}")
    bench_two_gpus.keep_timelines(Turn("disaggregated, NCCL"), results)
    names = {f"disaggregated-NCCL-decode-1{ending}" for ending in (STEPS, SENT)}
    assert {path.name for path in results.iterdir()} == names and not [*recorded_at.iterdir()]
    assert "nothing arrived, 32 rows" in capsys.readouterr().out
