"""What verifying drafts costs on a GPU, what a head costs, and what drafts bring that are right as often as is said.

Run: `make bench-speculation` on a machine with a GPU. Prints its tables and, as its last line, one JSON object with the
raw numbers. The model has the shape of Llama-3.1-8B and random weights, but for its embeddings, which have it count:
the token behind n is n + 1, by far. So what a drafter has to guess is known, and no rounding changes it.

Costs: steps of so many sequences, each with its newest token and drafts behind it up to 2, 4 or 8 tokens in all,
launched one behind the other, against steps without drafts.

Head: of an EAGLE-3 head of the public shape with random weights (`gpu_heads.py`) its own steps, and what a step takes
more that hands out states for it; then the whole engine loop with this head, which is never right, against none.

Speed-up: tokens per second of the whole engine loop, with as many drafts as the engine finds worth it, against the same
engine without. Each draft is right with the same chance, independently. The bound is what the best fixed number of
drafts would bring if a step took what it takes the GPU alone, as the first table has it. The bound by luck is the same
with the drafts that really were right and wrong in that run: what it is above or below the bound is luck of the draws,
and what the engine stays below it is loss. Small batches are measured for longer, since they draw less in a step.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine.engine import Engine
from deployments.engine.model.load import LoadedModel
from deployments.engine.scheduling.block_tables import BlockTables
from deployments.engine.scheduling.ids import block_array, token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.speculation.base import Drafter, Prospect, Wish
from deployments.messages import Draws, GenerateRequest, SamplingParams, TokenOutput
from tests.bench.counting import load_counting
from tests.bench.gpu_heads import HeadCosts, head_costs, with_random_head
from tests.bench.gpu_shapes import SHAPES
from tests.engine.insides import drafter_of, runner_of, speculate_by

MAX_TOKENS = 8  # of a sequence in a step
CONTEXT = 300
WARM_UP_LAUNCHES, LAUNCHES = 5, 30
PROMPT_TOKENS, WARM_UP_TOKENS = 256, 100


LOOKUP = SpeculationConfig(method="ngram", max_drafts=MAX_TOKENS - 1)
HEAD = SpeculationConfig(method="eagle3", model="random", max_drafts=MAX_TOKENS - 1)


def build(loaded: LoadedModel, max_num_seqs: int, speculation: SpeculationConfig) -> Engine:
    settings = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=4096,
        kv_cache_bytes=20 << 30,
        hands_over=False,
        speculation=speculation,
    )
    return Engine(loaded, settings)


def launch_s(engine: Engine, num_seqs: int, tokens_each: int) -> float:
    """Seconds of a step of decodes alone, of so many tokens each, launched one behind the other."""
    runner, size = runner_of(engine), engine.limits.block_size
    blocks = -(-(CONTEXT + tokens_each) // size)
    items = []
    for number in range(num_seqs):
        tokens = token_array(np.random.default_rng(number).integers(0, 1000, CONTEXT + 1).tolist())
        request = GenerateRequest(f"c{number}", tuple(tokens[:1]), SamplingParams(max_tokens=100, temperature=0.0))
        table = block_array(block % engine.limits.num_blocks for block in range(number * blocks, (number + 1) * blocks))
        sequence = Sequence(
            request, Role.LOCAL, 0.0, token_ids=tokens, tables=BlockTables(table), num_computed_tokens=CONTEXT
        )
        items.append(ScheduledSequence.decode(sequence, (7,) * (tokens_each - 1)))
    for _ in range(WARM_UP_LAUNCHES):
        runner.launch(items)
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    for _ in range(LAUNCHES):
        runner.launch(items)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun_s) / LAUNCHES


class Answers:
    """What the model will say to each request, and what a drafter guesses of it."""

    def __init__(self, vocab_size: int, chance: float) -> None:
        self._vocab_size, self._chance = vocab_size, chance
        self._guesses: dict[str, tuple[int, ...]] = {}

    def right(self, request: GenerateRequest) -> np.ndarray:
        return (request.prompt_token_ids[-1] + 1 + np.arange(request.sampling.max_tokens)) % self._vocab_size

    def guess(self, request: GenerateRequest) -> tuple[int, ...]:
        """The same each time."""
        guess = self._guesses.get(request.request_id)
        if guess is None:
            guess = self._guesses[request.request_id] = self._guess(request)
        return guess

    def _guess(self, request: GenerateRequest) -> tuple[int, ...]:
        """The answer, with every token wrong with the chance that is left."""
        rng = np.random.default_rng(int(request.request_id.rpartition("-")[2]))
        right = self.right(request)
        is_wrong = rng.random(len(right)) >= self._chance
        return tuple(np.where(is_wrong, (right + 3) % self._vocab_size, right).tolist())


class Guessing:
    """Copies its guesses from a list, which takes next to nothing; a `Drafter`."""

    num_kinds = 1

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def look(self, wish: Wish) -> Prospect | None:
        return Prospect(wish.num_tokens)

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        drafts = []
        for sequence, num_tokens in wishes:
            first = sequence.num_generated_tokens
            drafts.append(self._answers.guess(sequence.request)[first : first + num_tokens])
        return drafts

    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: torch.Tensor | None) -> None:
        """It knows how often it is right."""

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def drop(self, request_id: str) -> None:
        """It keeps nothing of sequences."""


def measured_tokens(batch: int) -> int:
    """Of each sequence. Of 200 alone the luck of 50 steps moves the rate by 5%."""
    return 1000 if batch == 1 else 500 if batch <= 8 else 200


def steps_needed(is_right: np.ndarray, tokens: int) -> int:
    """Steps to draw an answer with so many tokens in each, the last step in full or not.

    Args:
        is_right: (N,) of each token of the answer, whether the draft at its place is right.
        tokens: at least 1: the newest one and the drafts behind it.
    """
    num_right = np.zeros(len(is_right) + 1, dtype=np.int64)  # from each place on without a wrong one
    for place in range(len(is_right) - 1, -1, -1):
        num_right[place] = num_right[place + 1] + 1 if is_right[place] else 0
    most = np.minimum(num_right, tokens - 1).tolist()
    place = steps = 0
    while place < len(is_right):
        place, steps = place + most[place] + 1, steps + 1
    return steps


@dataclass
class Run:
    """Tokens per second of one batch with one kind of drafts, each time it was measured, and what came of these.

    Attributes:
        batch: sequences.
        chance: that a draft is right; None: nobody makes any that are.
        measured: tokens that the rates are of, of all sequences.
        steps: by tokens of each step, how many of one sequence these would have been; their drafts as they really were.
    """

    batch: int
    chance: float | None
    rates: list[float] = field(default_factory=list)
    drafted: float = 0.0
    accepted: float = 0.0
    runs_with_drafts: int = 0
    measured: int = 0
    steps: dict[int, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def note(self, is_right: np.ndarray) -> None:
        """(N,) Of each token of one sequence that was measured, whether the draft at its place is right."""
        self.measured += len(is_right)
        for tokens in range(1, MAX_TOKENS + 1):
            self.steps[tokens] = self.steps.get(tokens, 0) + steps_needed(is_right, tokens)


class Loop:
    """Drives an engine as `EngineLoop` does."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine, self._vocab_size = engine, vocab_size
        self._own: Drafter = drafter_of(engine)
        self._rng = np.random.default_rng(0)
        self._count = 0

    def measure(self, run: Run, *, by_own: bool = False) -> None:
        """Once more, with drafts that are right so often, without any, or with those of the engine's own drafter.

        Raises:
            RuntimeError: a token is not the one that the model must say.
        """
        engine, answers = self._engine, Answers(self._vocab_size, run.chance or 0.0)
        drafter = self._own if by_own else None if run.chance is None else Guessing(answers)
        speculate_by(engine, drafter, LOOKUP)
        before, requests = engine.stats(), [self._add() for _ in range(run.batch)]
        told: dict[str, list[int]] = {request.request_id: [] for request in requests}
        self._step_until(told, WARM_UP_TOKENS)
        first, begun_s = {name: len(tokens) for name, tokens in told.items()}, time.perf_counter()
        self._step_until(told, WARM_UP_TOKENS + measured_tokens(run.batch))
        measured = sum(map(len, told.values())) - sum(first.values())
        run.rates.append(measured / (time.perf_counter() - begun_s))
        for request in requests:
            engine.abort(request.request_id)
            tokens = told[request.request_id]
            if tokens != answers.right(request)[: len(tokens)].tolist():
                raise RuntimeError(f"{request.request_id}: the model does not count: {tokens[:20]}")
            if run.chance is not None:
                begin, end = first[request.request_id], len(tokens)
                run.note(np.array(answers.guess(request)[begin:end]) == tokens[begin:end])
        while engine.has_work:
            engine.step()
        now = engine.stats()
        run.drafted += now.drafted_tokens.total - before.drafted_tokens.total
        run.accepted += now.accepted_tokens.total - before.accepted_tokens.total
        run.runs_with_drafts += sum(now.drafted_tokens.counts) - sum(before.drafted_tokens.counts)

    def _add(self) -> GenerateRequest:
        self._count += 1
        prompt = tuple(self._rng.integers(0, self._vocab_size, PROMPT_TOKENS).tolist())
        request = GenerateRequest(f"r-{self._count}", prompt, SamplingParams(max_tokens=3000, temperature=0.0))
        self._engine.add(request)
        return request

    def _step_until(self, told: dict[str, list[int]], num_tokens: int) -> None:
        """Until so many tokens of each are told, on average."""
        while sum(map(len, told.values())) < num_tokens * len(told) or not all(told.values()):
            for event in self._engine.step():
                if isinstance(event, TokenOutput):
                    told[event.request_id] += event.token_ids


def bound(costs: dict[int, float], chance: float) -> tuple[float, int]:
    """The best speed-up that a fixed number of tokens per sequence and step brings, and that number."""
    expected = {tokens: sum(chance**place for place in range(tokens)) for tokens in costs}
    return max((expected[tokens] * costs[1] / costs[tokens], tokens) for tokens in costs)


def bound_by_luck(costs: dict[int, float], run: Run) -> tuple[float, int]:
    """Likewise, with the drafts of this run."""
    return max((run.measured / run.steps[tokens] * costs[1] / costs[tokens], tokens) for tokens in costs)


def measure_costs(engine: Engine, batches: list[int]) -> dict[int, dict[int, float]]:
    """Seconds of a step, of each number of sequences and of tokens of each."""
    print("| sequences | tokens of each | ms | of a step without drafts |\n|---|---|---|---|")
    found: dict[int, dict[int, float]] = {}
    for batch in batches:
        own = found[batch] = {}
        for tokens in range(1, MAX_TOKENS + 1):
            if batch * tokens > 512:
                break
            own[tokens] = launch_s(engine, batch, tokens)
            print(f"| {batch} | {tokens} | {own[tokens] * 1e3:.3f} | {own[tokens] / own[1]:.3f} |", flush=True)
    return found


def measure_speedups(
    engine: Engine, vocab_size: int, costs: dict[int, dict[int, float]], chances: list[float], repeats: int
) -> list[Run]:
    """Of each number of sequences without drafts and with each kind of them."""
    print(
        "| sequences | right | tokens/s without | with | ratio | bound (at tokens) | of it | tried | right of them "
        "| bound by luck | of it |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    loop, runs = Loop(engine, vocab_size), []
    for batch, own in costs.items():
        plain, guessed = Run(batch, None), [Run(batch, chance) for chance in chances]
        for _ in range(repeats):
            for run in (plain, *guessed):
                loop.measure(run)
        for run in guessed:
            assert run.chance is not None
            ratio, (most, tokens) = run.rate / plain.rate, bound(own, run.chance)
            lucky, at = bound_by_luck(own, run)
            tried = run.drafted / run.runs_with_drafts if run.runs_with_drafts else 0.0
            right = run.accepted / run.drafted if run.drafted else 0.0
            print(
                f"| {batch} | {run.chance:.0%} | {plain.rate:.0f} | {run.rate:.0f} | {ratio:.2f} "
                f"| {most:.2f} ({tokens}) | {ratio / most:.0%} | {tried:.1f} | {right:.2f} "
                f"| {lucky:.2f} ({at}) | {ratio / lucky:.0%} |",
                flush=True,
            )
        runs += [plain, *guessed]
    return runs


def measure_head(
    engine: Engine, loaded: LoadedModel, costs: dict[int, dict[int, float]], repeats: int
) -> tuple[dict[int, HeadCosts], list[Run]]:
    """What a head costs for each number of sequences: its steps, and the whole loop with guesses that are never right.

    Args:
        engine: without a head.
        loaded: its model.
        costs: of steps without a head.
        repeats: of the loop.
    """
    beside = build(with_random_head(loaded), engine.limits.max_num_seqs, HEAD)
    loop, found, runs = Loop(beside, loaded.vocab_size), {}, []
    print("| sequences | states of a step, ms | their KV | first guess | one more | on the GPU | of a plain step |")
    print("|---|---|---|---|---|---|---|")
    for batch, own in costs.items():
        states_s = statistics.median(launch_s(beside, batch, 1) - launch_s(engine, batch, 1) for _ in range(3))
        cost = found[batch] = head_costs(beside, batch, MAX_TOKENS - 1, CONTEXT, states_s)
        milliseconds = " | ".join(f"{seconds * 1e3:.3f}" for seconds in asdict(cost).values())
        print(f"| {batch} | {milliseconds} | {cost.more_s / own[1]:.1%} |", flush=True)
    print("| sequences | tokens/s without | with a head that is never right | ratio | tried |\n|---|---|---|---|---|")
    for batch in costs:
        plain, guessed = Run(batch, None), Run(batch, None)
        for _ in range(repeats):
            loop.measure(plain)
            loop.measure(guessed, by_own=True)
        tried = guessed.drafted / guessed.runs_with_drafts if guessed.runs_with_drafts else 0.0
        ratio = guessed.rate / plain.rate
        print(f"| {batch} | {plain.rate:.0f} | {guessed.rate:.0f} | {ratio:.3f} | {tried:.1f} |", flush=True)
        runs += [plain, guessed]
    return found, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--chances", type=float, nargs="*", default=[0.6, 0.7, 0.8])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=("head", "speedups"), default=["head", "speedups"])
    args = parser.parse_args()
    begun_s = time.perf_counter()
    loaded = load_counting(SHAPES[args.shape].config(), "cuda")
    engine = build(loaded, max(args.batches), LOOKUP)
    print(f"{torch.cuda.get_device_name()}, {args.shape}: ready in {time.perf_counter() - begun_s:.1f} s")
    gc.collect()
    gc.freeze()  # as the process of an engine does
    costs = measure_costs(engine, args.batches)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": args.shape}
    report |= {"command": sys.argv, "costs_s": costs}
    if "head" in args.parts:
        head, runs = measure_head(engine, loaded, costs, args.repeats)
        own = {batch: asdict(cost) for batch, cost in head.items()}
        report |= {"head": own, "runs_with_head": [asdict(run) for run in runs]}
    if "speedups" in args.parts:
        runs = measure_speedups(engine, loaded.vocab_size, costs, args.chances, args.repeats)
        report |= {"runs": [asdict(run) for run in runs]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
