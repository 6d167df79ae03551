"""A service in virtual time, with the real scheduler and the real admission: goodput holds beyond the capacity."""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.scheduler import Schedule, Scheduler
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.stats import EngineStats
from deployments.errors import OverloadedError
from deployments.load.admission import Admission, Bounds, Ticket
from deployments.load.reading import DECODE, Reading
from deployments.messages import DrawnToken, GenerateRequest, Priority, SamplingParams

MAX_TTFT_S = 6.0
STEP_S, PROMPT_TOKEN_S, DECODE_S = 0.02, 1 / 500, 0.003
WARMUP_S, END_S = 40.0, 340.0
LIMITS = EngineLimits(max_model_len=4096, block_size=16, num_blocks=2000, max_num_seqs=32, max_num_batched_tokens=128)


@dataclass
class Served:
    """What became of one request."""

    arrival_s: float
    priority: Priority
    key: bytes
    ttft_s: float | None = None


@dataclass
class Service:
    """One colocated engine and one ingress.

    Args:
        max_ttft_s: of admission.
        num_seats: sequences that run at once.
        output_tokens: of every request.
    """

    max_ttft_s: float
    num_seats: int = LIMITS.max_num_seqs
    output_tokens: int = 16
    now_s: float = 0.0
    served: list[Served] = field(default_factory=list)
    refused: list[Served] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = BlockManager(LIMITS.num_blocks, LIMITS.block_size, enable_prefix_caching=False)
        self.scheduler = Scheduler(self.blocks, replace(LIMITS, max_num_seqs=self.num_seats))
        self.admission = Admission(Bounds(self.max_ttft_s, 1_000_000, None), lambda: self.now_s)
        self.stats = EngineStats(
            num_blocks=LIMITS.num_blocks,
            max_num_seqs=self.num_seats,
            max_num_batched_tokens=LIMITS.max_num_batched_tokens,
            num_receivers=1,
        )
        self.running: dict[str, tuple[Served, Ticket]] = {}
        self.last_reading_s = -1.0
        self.gives_up_every: int | None = None

    def run(self, arrivals: Iterator[tuple[float, int, Priority, bytes]]) -> None:
        for at_s, size, priority, key in arrivals:
            while self.now_s < at_s and self.scheduler.has_work:
                self._step()
            self.now_s = max(self.now_s, at_s)
            self._read()
            self._arrive(Served(at_s, priority, key), size)

    def goodput_per_s(self) -> float:
        inside = [s for s in self.served if s.arrival_s >= WARMUP_S and s.ttft_s is not None]
        return sum(s.ttft_s is not None and s.ttft_s <= MAX_TTFT_S for s in inside) / (END_S - WARMUP_S)

    def _arrive(self, one: Served, size: int) -> None:
        try:
            ticket = self.admission.admit([size], one.priority, one.key)
        except OverloadedError:
            self.refused.append(one)
            return
        self.served.append(one)
        request_id = str(len(self.served))
        self.running[request_id] = one, ticket
        request = GenerateRequest(request_id, (0,) * size, SamplingParams(max_tokens=self.output_tokens), one.priority)
        self.scheduler.add(Sequence(request, Role.LOCAL, self.now_s))
        if self.gives_up_every and len(self.served) % self.gives_up_every == 0:
            self._give_up(str(len(self.served) - 2))

    def _give_up(self, request_id: str) -> None:
        if request_id in self.scheduler and self.scheduler[request_id].num_generated_tokens == 0:
            self.scheduler.remove(request_id)
            self.running[request_id][1].close()

    def _step(self) -> None:
        schedule = self.scheduler.schedule()
        num_prompt = sum(item.num_prompt_tokens for item in schedule.scheduled)
        num_decodes = sum(item.is_decode for item in schedule.scheduled)
        step_s = STEP_S + num_prompt * PROMPT_TOKEN_S + num_decodes * DECODE_S
        self.now_s += step_s
        self.stats.prompt_tokens += num_prompt
        self.stats.prefill_steps += num_prompt > 0
        self.stats.prefill_s += step_s if num_prompt else 0.0
        self._conclude(schedule)
        self._read()

    def _conclude(self, schedule: Schedule) -> None:
        for item in schedule.scheduled:
            sequence = item.sequence
            sequence.begin(item)
            if not sequence.conclude(item, (DrawnToken(0),) * item.num_draws):
                continue
            one, ticket = self.running[sequence.request_id]
            if sequence.num_generated_tokens == 1:
                one.ttft_s = self.now_s - one.arrival_s
                ticket.first_token(0)
            if sequence.num_generated_tokens == self.output_tokens:
                self.scheduler.remove(sequence.request_id)
                ticket.close()

    def _read(self) -> None:
        if self.now_s - self.last_reading_s < 1.0:
            return
        self.last_reading_s = self.now_s
        stats, scheduler = self.stats, self.scheduler
        stats.num_queued_prompt_tokens = scheduler.num_queued_prompt_tokens
        stats.num_waiting, stats.num_running = len(scheduler.waiting), len(scheduler.running)
        stats.num_used_blocks = self.blocks.num_held_blocks
        stats.finished = scheduler.num_finished
        self.admission.update(Reading({DECODE: {"d": stats.copy()}}, self.now_s))


def poisson(
    per_s: float, seed: str, priority: Priority = Priority.NORMAL, key: bytes = b"", sizes: tuple[int, int] = (100, 500)
) -> Iterator[tuple[float, int, Priority, bytes]]:
    rng, now_s = random.Random(seed), 0.0
    while (now_s := now_s + rng.expovariate(per_s)) < END_S:
        yield now_s, rng.randint(*sizes), priority, key


def serve(*streams: Iterator[tuple[float, int, Priority, bytes]], max_ttft_s: float = MAX_TTFT_S) -> Service:
    service = Service(max_ttft_s)
    service.run(heapq.merge(*streams))
    return service


# 300 prompt tokens take 0.6 s, with their steps and the decodes between them about 0.8.
CAPACITY_PER_S = 1.25


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_goodput_at_three_times_the_capacity_is_that_of_the_best_load(seed: str) -> None:
    goodput = {factor: serve(poisson(factor * CAPACITY_PER_S, seed)).goodput_per_s() for factor in (0.5, 1, 1.5, 2, 3)}
    assert goodput[3] >= 0.9 * max(goodput.values()), goodput
    assert goodput[3] >= 1.0, goodput


@pytest.mark.parametrize("seed", ["1", "2"])
def test_so_is_it_where_seats_are_scarce_and_not_time_for_prompts(seed: str) -> None:
    goodput = {}
    for factor in (0.8, 1, 3):
        service = Service(MAX_TTFT_S, num_seats=4, output_tokens=150)
        service.run(poisson(factor * 4 / (150 * (STEP_S + 4 * DECODE_S)), seed, sizes=(10, 60)))
        goodput[factor] = service.goodput_per_s()
    assert goodput[3] >= 0.9 * max(goodput.values()), goodput
    assert goodput[3] >= 0.65, goodput


def test_clients_that_give_up_at_once_neither_fill_the_queue_nor_open_the_door() -> None:
    calm, torn = serve(poisson(3 * CAPACITY_PER_S, "1")), Service(MAX_TTFT_S)
    torn.gives_up_every = 3
    torn.run(poisson(3 * CAPACITY_PER_S, "1"))
    late = [one for one in torn.served if one.ttft_s is not None and one.ttft_s > MAX_TTFT_S]
    assert torn.goodput_per_s() >= 0.9 * calm.goodput_per_s() and len(late) <= 0.05 * len(torn.served)


def test_without_admission_it_collapses() -> None:
    assert serve(poisson(3 * CAPACITY_PER_S, "1"), max_ttft_s=1e6).goodput_per_s() < 0.3


def test_what_is_let_in_is_in_time() -> None:
    served = serve(poisson(3 * CAPACITY_PER_S, "1")).served
    late = [one for one in served if one.ttft_s is not None and one.ttft_s > MAX_TTFT_S]
    assert len(late) <= 0.05 * len(served), sorted(one.ttft_s or 0.0 for one in late)


def test_high_priority_is_served_whatever_the_others_ask_for() -> None:
    urgent = poisson(0.3 * CAPACITY_PER_S, "urgent", Priority.HIGH)
    service = serve(urgent, poisson(3 * CAPACITY_PER_S, "1"))
    refused = [one for one in service.refused if one.priority is Priority.HIGH]
    ttft_s = sorted(s.ttft_s for s in service.served if s.priority is Priority.HIGH and s.ttft_s is not None)
    assert len(refused) <= 0.05 * len(ttft_s), "those of a burst"
    assert ttft_s[len(ttft_s) // 2] < MAX_TTFT_S / 2


def test_a_modest_key_gets_what_it_asks_for_beside_a_greedy_one() -> None:
    modest, greedy = poisson(0.3 * CAPACITY_PER_S, "modest", key=b"m"), poisson(3 * CAPACITY_PER_S, "1", key=b"g")
    service = serve(modest, greedy, max_ttft_s=20.0)  # long enough that a single prompt does not fill a share
    refused = [one for one in service.refused if one.key == b"m" and one.arrival_s > WARMUP_S]
    served = [one for one in service.served if one.key == b"m" and one.arrival_s > WARMUP_S]
    assert len(refused) <= 0.02 * len(served), (len(refused), len(served))
