"""Plays a schedule of `load_tests` from one event loop, where there is no AIPerf; what comes back are its samples.

Costs little: replies are only noted while the run lasts, and made sense of behind it.
"""

import asyncio
import resource
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from load_tests.generator import judge, request_body
from load_tests.samples import Run, Sample
from load_tests.scenario import Scenario
from load_tests.schedule import Planned, build_schedule
from tests.bench.serving.client import Connection, Reply, post


@dataclass
class Player:
    """One run.

    Args:
        port: of the service on this machine.
        model: its name in the API.
        end_s: nothing is sent later; seconds since `start_s`, as all times.
        drain_s: how long answers are awaited after that.
        with_receipts: ask for each one's receipt.
        sent: takes each request that was sent, and its reply.
    """

    port: int
    model: str
    end_s: float
    drain_s: float
    with_receipts: bool = False
    start_s: float = field(default_factory=time.monotonic)
    sent: list[tuple[Planned, Reply]] = field(default_factory=list)

    async def play(self, schedule: Sequence[Planned]) -> tuple[Sample, ...]:
        """Send all; every request that was sent, or should have been, as a sample."""
        sessions: dict[str, list[Planned]] = defaultdict(list)
        for request in schedule:
            sessions[request.session].append(request)
        tasks = [asyncio.create_task(self._play_session(turns)) for turns in sessions.values()]
        await asyncio.wait(tasks, timeout=self.end_s + self.drain_s)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return tuple(self._sample(request, reply) for request, reply in self.sent)

    def _now_s(self) -> float:
        return time.monotonic() - self.start_s

    async def _play_session(self, turns: Sequence[Planned]) -> None:
        connection: Connection | None = None
        try:
            for request in turns:
                wait_s = request.delay_s if request.at_s is None else request.at_s - self._now_s()
                await asyncio.sleep(max(0.0, wait_s))
                if self._now_s() >= self.end_s:
                    return
                connection = await post(self.port, self._body(request))
                self.sent.append((request, connection.reply))
                await connection.reply.done.wait()
        finally:
            if connection is not None:
                connection.transport.close()

    def _body(self, request: Planned) -> dict[str, Any]:
        body = request_body(request, self.model)
        if self.with_receipts:
            body["stream_options"] |= {"include_receipt": True}
        return body

    def _sample(self, request: Planned, reply: Reply) -> Sample:
        whole = reply.done.is_set()
        refused = bool(reply.pieces) and not reply.body.startswith(b"HTTP/1.1 200")
        events = [] if refused else reply.events()
        failed = any("error" in event for _, event in events)
        times = [at for at, event in events if event.get("choices") and event["choices"][0]["text"]]
        count = next((event["usage"]["completion_tokens"] for _, event in events if event.get("usage")), 0)
        error = None
        if not whole:
            error = "unfinished"
        elif refused:
            error = f"HTTP {reply.body[9:12].decode()}"
        elif failed:
            error = "error event"
        elif count != request.output_tokens:
            error = "wrong number of tokens"
        return Sample(
            request_class=request.request_class,
            session=request.session,
            turn=request.turn,
            planned_s=request.at_s,
            sent_s=reply.sent_s - self.start_s,
            ttft_s=times[0] - reply.sent_s if times else None,
            gaps_s=tuple(later - earlier for earlier, later in pairwise(times)),
            end_s=reply.pieces[-1][0] - self.start_s if reply.pieces else None,
            prompt_tokens=len(request.prompt),
            output_tokens=count,
            error=error,
        )


def play(
    schedule: Sequence[Planned],
    port: int,
    model: str,
    end_s: float,
    drain_s: float,
    receipts: list[tuple[Planned, Reply]] | None = None,
) -> tuple[Sample, ...]:
    """See `Player`; `receipts` takes what was sent, if receipts are to be asked for."""

    async def started() -> tuple[Sample, ...]:
        player = Player(port, model, end_s, drain_s, with_receipts=receipts is not None)
        samples = await player.play(schedule)
        if receipts is not None:
            receipts.extend(player.sent)
        return samples

    return asyncio.run(started())


def run(
    scenario: Scenario,
    port: int,
    model: str,
    deployment: str,
    round_: int,
    load: float = 1.0,
    receipts: list[tuple[Planned, Reply]] | None = None,
) -> Run:
    """Run a scenario once; runs of one round and load send the same at the same times. `receipts`: see `play`."""
    schedule = build_schedule(scenario, f"{scenario.name}/{round_}/{load:g}", load)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    begun, cpu_s = time.monotonic(), _cpu_s()
    samples = play(schedule, port, model, scenario.warmup_s + scenario.duration_s, scenario.drain_s, receipts)
    share = (_cpu_s() - cpu_s) / (time.monotonic() - begun)
    return Run(
        scenario=scenario.name,
        deployment=deployment,
        url=f"http://127.0.0.1:{port}",
        load=load,
        round=round_,
        started_at=started_at,
        warmup_s=scenario.warmup_s,
        duration_s=scenario.duration_s,
        samples=samples,
        generator=judge(samples, {"player": share}),
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
