"""The load generator: NVIDIA's AIPerf, driven by our schedules. Sends them, brings back what its clients saw.

Owns AIPerf's command line, its files, and the judgement whether it kept up. Knows nothing of what the figures mean.
AIPerf has one class of traffic per run; here the schedule says which request was of which class.

Source: https://github.com/ai-dynamo/aiperf, `mooncake_trace` datasets with verbatim payloads on a fixed schedule.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from load_tests.punctual import put_first
from load_tests.samples import GeneratorHealth, Sample
from load_tests.schedule import Planned

# Beyond these the run says more about the client than about the server.
MAX_LAG_P99_S = 0.1
MAX_CPU_SHARE = 0.8
# How often /metrics is read: each reading asks every replica, so AIPerf's own third of a second would be load.
_METRICS_INTERVAL_S = 2.0
_CPU_INTERVAL_S = 1.0
# Of AIPerf's processes those between a schedule and its requests.
SENDERS = {"dataset_manager", "system_controller", "timing_manager", "worker"}
# AIPerf starts a dozen processes; on two busy cores that takes most of a minute.
_START_TIMEOUT_S = 180.0
# Of the server's metrics by their type, as AIPerf names them; how replicas are put together, where not by their mean.
_STATISTICS = {
    "gauge": ("avg", "max"),
    "counter": ("total",),
    "histogram": ("count", "avg", "p50_estimate", "p99_estimate"),
}
_MERGES: dict[str, Callable[[list[float]], float]] = {"total": sum, "count": sum, "max": max, "p99_estimate": max}


class GeneratorError(Exception):
    """AIPerf is missing or failed; the message says what to do, or where its log is."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured.

    Attributes:
        url: of the service, without `/v1`.
        model: its name in the API.
        api_key: sent as a bearer token; None: nothing is.
    """

    url: str
    model: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """What came back: every planned request as a sample, the generator's health, the server's own figures."""

    samples: tuple[Sample, ...]
    health: GeneratorHealth
    server: dict[str, float]


def send(schedule: Sequence[Planned], target: Target, end_s: float, drain_s: float, folder: Path) -> Observed:
    """Send a schedule and wait for its answers.

    Args:
        schedule: what to send.
        target: where to.
        end_s: nothing is sent later, whatever the schedule still holds.
        drain_s: how long answers are awaited after that.
        folder: for AIPerf's files; emptied first.

    Raises:
        GeneratorError: AIPerf is missing, failed, or did not end.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_dataset(folder / "schedule.jsonl", schedule, target)
    _write_tokenizer(folder / "tokenizer")
    with open(folder / "aiperf.log", "wb") as log:
        process = subprocess.Popen(
            _command(target, end_s, drain_s, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"AIPERF_SERVER_METRICS_COLLECTION_INTERVAL": str(_METRICS_INTERVAL_S)},
            start_new_session=True,
        )
    watch = _CpuWatch(process.pid)
    try:
        status = process.wait(_START_TIMEOUT_S + end_s + drain_s)
    except subprocess.TimeoutExpired:
        raise GeneratorError(f"AIPerf did not end; its log: {folder / 'aiperf.log'}") from None
    finally:
        watch.stop()
        _kill_session(process)
    records_file = folder / "artifacts" / "profile_export.jsonl"
    if status != 0 or not records_file.exists():
        raise GeneratorError(f"AIPerf ended with status {status}:\n{_last_lines(folder / 'aiperf.log')}")
    records = [json.loads(line) for line in records_file.read_text().splitlines()]
    samples, start_s = match(schedule, records, end_s)
    health = judge(samples, watch.shares(start_s, start_s + end_s))
    return Observed(samples, health, _server_figures(folder / "artifacts" / "server_metrics_export.json"))


def _command(target: Target, end_s: float, drain_s: float, folder: Path) -> list[str]:
    command = [find_aiperf(), "profile", "--model", target.model, "--url", target.url, "--endpoint-type", "completions"]
    command += ["--streaming", "--input-file", str(folder / "schedule.jsonl")]
    command += ["--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
    command += ["--benchmark-duration", str(end_s), "--benchmark-grace-period", str(drain_s)]
    command += ["--use-server-token-count", "--tokenizer", str(folder / "tokenizer")]
    command += ["--workers-max", "1", "--record-processors", "1", "--no-gpu-telemetry", "--ui", "none"]
    command += ["--export-level", "records", "--artifact-dir", str(folder / "artifacts")]
    return command + (["--api-key", target.api_key] if target.api_key else [])


def find_aiperf() -> str:
    """Path of the command: beside this Python, else on the PATH.

    Raises:
        GeneratorError: it is not installed.
    """
    beside = Path(sys.executable).with_name("aiperf")
    found = str(beside) if beside.exists() else shutil.which("aiperf")
    if found is None:
        raise GeneratorError("aiperf is not installed: pip install -r load_tests/requirements.txt, or use `make load`")
    return found


def _write_dataset(path: Path, schedule: Sequence[Planned], target: Target) -> None:
    with open(path, "w") as lines:
        for request in schedule:
            line: dict[str, Any] = {"session_id": request.session, "output_length": request.output_tokens}
            line |= {"payload": request_body(request, target.model)}
            line |= {"delay": request.delay_s * 1e3} if request.at_s is None else {"timestamp": request.at_s * 1e3}
            lines.write(json.dumps(line) + "\n")


def request_body(request: Planned, model: str) -> dict[str, Any]:
    """What is sent for a request, to `/v1/completions`."""
    # Token ids and `ignore_eos` make both lengths exact with no tokenizer; vLLM and SGLang take them as well.
    return {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _write_tokenizer(folder: Path) -> None:
    # AIPerf insists on one; with verbatim payloads and the server's token counts it is never used.
    folder.mkdir()
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def match(
    schedule: Sequence[Planned], records: Sequence[dict[str, Any]], end_s: float
) -> tuple[tuple[Sample, ...], float]:
    """Join AIPerf's records with the schedule.

    Args:
        schedule: what was to be sent.
        records: lines of AIPerf's `profile_export.jsonl`.
        end_s: later requests were not to be sent.

    Returns:
        Every request that was sent or should have been, and the start of the run as a Unix time.
    """
    by_key = {(record["metadata"]["conversation_id"], record["metadata"]["turn_index"]): record for record in records}
    starts = [
        by_key[key]["metadata"]["credit_issued_ns"] / 1e9 - request.at_s
        for request in schedule
        if request.at_s is not None and (key := (request.session, request.turn)) in by_key
    ]
    # None is sent early, so the earliest of these is the start of the run.
    start_s = min(starts, default=0.0)
    samples = []
    for request in schedule:
        record = by_key.get((request.session, request.turn))
        if record is not None:
            samples.append(_sample(request, record, start_s))
        elif request.at_s is not None and request.at_s < end_s:
            samples.append(_unsent(request))
    return tuple(samples), start_s


def _sample(request: Planned, record: dict[str, Any], start_s: float) -> Sample:
    metadata, metrics = record["metadata"], record.get("metrics") or {}

    def value(name: str) -> Any:
        return metrics[name]["value"] if name in metrics else None

    ttft_ms, gaps_ms = value("time_to_first_token"), value("inter_chunk_latency") or []
    output_tokens = int(value("usage_completion_tokens") or 0)
    return Sample(
        request_class=request.request_class,
        session=request.session,
        turn=request.turn,
        planned_s=request.at_s,
        sent_s=metadata["request_start_ns"] / 1e9 - start_s,
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        gaps_s=tuple(gap / 1e3 for gap in gaps_ms),
        end_s=metadata["request_end_ns"] / 1e9 - start_s,
        prompt_tokens=len(request.prompt),
        output_tokens=output_tokens,
        error=_error_kind(record, output_tokens, request),
    )


def _error_kind(record: dict[str, Any], output_tokens: int, request: Planned) -> str | None:
    if record["metadata"].get("was_cancelled"):
        return "unfinished"
    if error := record.get("error"):
        return f"HTTP {error['code']}" if error.get("code") else str(error.get("type") or "unknown")
    if output_tokens != request.output_tokens:
        return "wrong number of tokens"
    return None


def _unsent(request: Planned) -> Sample:
    return Sample(
        request_class=request.request_class,
        session=request.session,
        turn=request.turn,
        planned_s=request.at_s,
        sent_s=None,
        ttft_s=None,
        gaps_s=(),
        end_s=None,
        prompt_tokens=len(request.prompt),
        output_tokens=0,
        error="not sent",
    )


def judge(samples: Sequence[Sample], cpu: dict[str, float]) -> GeneratorHealth:
    """Decide whether the generator kept up, from its lag behind the schedule and the CPU that it used."""
    lags = [s.sent_s - s.planned_s for s in samples if s.sent_s is not None and s.planned_s is not None] or [0.0]
    p50, p99, longest = (float(np.percentile(lags, share)) for share in (50, 99, 100))
    problems = []
    if p99 > MAX_LAG_P99_S:
        problems.append(f"requests were sent late: p99 {p99 * 1e3:.0f} ms, allowed {MAX_LAG_P99_S * 1e3:.0f}")
    problems += [
        f"its process {name} used {share:.0%} of a core, allowed {MAX_CPU_SHARE:.0%}"
        for name, share in cpu.items()
        if share > MAX_CPU_SHARE
    ]
    if unsent := sum(sample.error == "not sent" for sample in samples):
        problems.append(f"{unsent} requests were never sent")
    return GeneratorHealth({"p50": p50, "p99": p99, "max": longest}, cpu, tuple(problems))


class _CpuWatch:
    """Reads the CPU seconds of a process and its descendants, once a second, from a thread; has senders come first."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._readings: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def shares(self, start: float, end: float) -> dict[str, float]:
        """Share of a core by process between two Unix times."""
        found = {}
        for name, readings in self._readings.items():
            inside = [reading for reading in readings if start <= reading[0] <= end]
            if len(inside) > 1:
                (first_s, first_cpu), (last_s, last_cpu) = inside[0], inside[-1]
                found[name] = (last_cpu - first_cpu) / (last_s - first_s)
        return found

    def _watch(self) -> None:
        while not self._stopped.wait(_CPU_INTERVAL_S):
            for process, name, cpu_s in self._read():
                self._readings[name].append((time.time(), cpu_s))
                if name in SENDERS:
                    put_first(process)

    def _read(self) -> Iterator[tuple[psutil.Process, str, float]]:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                name = name_of(process)
                times = process.cpu_times()
            except psutil.Error:
                continue
            yield process, name, times.user + times.system


def name_of(process: psutil.Process) -> str:
    """AIPerf's processes name themselves, such as `aiperf timing_manager`, `aiperf worker_1f0c902e` if of several."""
    title = " ".join(process.cmdline()).strip()
    return re.sub(r"_[0-9a-f]{8}$", "", title.removeprefix("aiperf ")) if title.startswith("aiperf ") else "main"


def _server_figures(path: Path) -> dict[str, float]:
    """Flatten AIPerf's export of the server's /metrics: `name{labels} statistic` -> value, replicas put together."""
    if not path.exists():
        return {}
    found: dict[str, list[float]] = defaultdict(list)
    for name, metric in (json.loads(path.read_text())["metrics"] or {}).items():
        for series in metric["series"]:
            labels = {key: value for key, value in (series.get("labels") or {}).items() if key != "replica"}
            where = f"{{{','.join(f'{key}={value}' for key, value in sorted(labels.items()))}}}" if labels else ""
            for statistic in _STATISTICS.get(metric["type"], ()):
                if (value := (series.get("stats") or {}).get(statistic)) is not None:
                    found[f"{name}{where} {statistic}"].append(value)
    return {
        key.removesuffix("_estimate"): _MERGES.get(key.rpartition(" ")[2], statistics.mean)(values)
        for key, values in found.items()
    }


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """End whatever AIPerf left running."""
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid:
                other.kill()
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    process.wait()


def _last_lines(log: Path, count: int = 25) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join([*lines[-count:], f"(the whole log: {log})"])
