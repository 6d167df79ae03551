"""Hand-offs to a decode engine that guesses, beside those to one that does not: part of `bench_gpu_handoff`.

One prefill engine, which guesses nothing as those of a prefill pool do, hands prompts over to two decode engines, in
turn; on two GPUs these share one, and one of them is idle while the other one works. The model counts (`counting.py`),
and its prompts have a text in them that answers repeat, but for one token of twelve: so lookup finds drafts of which
most are right, and the tokens are known. Measured of each decode engine, on prompts that nobody has seen:

- the first token, which the prefill engine sends, and what is left of the hand-off behind it;
- the hand-off alone, of KV that is computed already, and the GiB/s of the bytes' own way into the pool;
- seconds per token of long answers behind a hand-off, and of those to the same prompts if the engine computed them.

Prints a table, what guesses change in percent, and as its last line one JSON object with every raw number.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import ray
import torch

from deployments.engine.config import EngineConfig
from deployments.engine.stats import EngineStats
from deployments.engine_builder import BuiltEngine, assemble_engine
from deployments.kv_transfer.base import TransferStats
from tests.bench.counting import edited_prompt, load_counting
from tests.bench.timed_engines import config_of, moved_s, start
from tests.bench.two_gpus.model import config_of as shape_of
from tests.engine_pair import DrivenEngine, HandOver, hand_over

LENGTHS = (512, 2048, 8000)
ANSWER_TOKENS = 129
REST_S = 0.3
ASKED = 0.03
LOOKS = 3
PLAIN = "off"


def build(shape: str, config: EngineConfig) -> BuiltEngine:
    """An engine whose model counts, the same in every process."""
    loaded = load_counting(shape_of(shape), "cpu" if shape == "tiny" else "cuda")
    return assemble_engine(loaded, config)


@dataclass
class Row:
    """What was measured of one decode engine with prompts of one length.

    Attributes:
        method: of guessing.
        tokens: of a prompt.
        bytes: of its KV.
        ttft_s: from the request to the first token, of each hand-off of a new prompt.
        behind_s: of the same hand-offs, from the first token to the last block in place.
        alone_s: of hand-offs of KV that was computed before.
        handed_token_s: of a token of each long answer behind a hand-off.
        own_token_s: of a token of each such answer to the same prompt, which the decode engine computed itself.
        drafted: tokens that were tried in both.
        accepted: of them those that were right.
        moved_s: of the bytes of one hand-off on their own way into the pool; 0: there is no GPU to tell.
        are_equal: whether each answer is what the model must say.
    """

    method: str
    tokens: int
    bytes: int = 0
    ttft_s: list[float] = field(default_factory=list)
    behind_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    handed_token_s: list[float] = field(default_factory=list)
    own_token_s: list[float] = field(default_factory=list)
    drafted: float = 0.0
    accepted: float = 0.0
    moved_s: float = 0.0
    are_equal: list[bool] = field(default_factory=list)

    def add(self, handed: HandOver) -> None:
        """One of a new prompt."""
        self.bytes = handed.num_bytes
        self.ttft_s.append(handed.ttft_s)
        self.behind_s.append(handed.behind_s)

    @property
    def hidden(self) -> float:
        """The share of a hand-off that was over with the first token."""
        return 1 - statistics.median(self.behind_s) / statistics.median(self.alone_s)


HEADING = (
    f"{'guesses':>8} {'tokens':>7} {'MiB':>6} {'TTFT ms':>9} {'alone ms':>9} {'behind ms':>10} {'hidden':>7}"
    f" {'GiB/s':>7} {'handed, ms/token':>17} {'own, ms/token':>14} {'':>6} {'right':>6}"
)


def line_of(row: Row) -> str:
    """Of the table: medians; behind both times per token what the hand-off changes in them."""
    milliseconds = {name: statistics.median(getattr(row, name)) * 1e3 for name in _COMPARED}
    handed, own = milliseconds["handed_token_s"], milliseconds["own_token_s"]
    rate = f"{row.bytes / row.moved_s / 2**30:.1f}" if row.moved_s else "-"
    right = f"{row.accepted / row.drafted:.2f}" if row.drafted else "-"
    return (
        f"{row.method:>8} {row.tokens:>7} {row.bytes / 2**20:>6.0f} {milliseconds['ttft_s']:>9.2f}"
        f" {milliseconds['alone_s']:>9.2f} {milliseconds['behind_s']:>10.2f} {row.hidden:>7.0%} {rate:>7}"
        f" {handed:>17.3f} {own:>14.3f} {handed / own - 1:>+6.1%} {right:>6}"
        f"  {'equal' if all(row.are_equal) else 'DIFFERENT'}"
    )


_COMPARED = ("ttft_s", "alone_s", "behind_s", "handed_token_s", "own_token_s")


@dataclass(frozen=True)
class Change:
    """What guesses change, as a share: 0.01 is one percent more. The issue asks for 3% of the first four.

    Attributes:
        tokens: of the prompts.
        ttft: of the first token.
        in_place: of the time until the last block is in place: first token, and what is behind it.
        alone: of the hand-off of KV that is computed already.
        handed_over_own: of a token behind a hand-off, over one of the engine alone, both with guesses.
        behind: of what is left behind the first token. A few milliseconds at most, so its share says little.
        token: of a token behind a hand-off: less by what guesses bring.
    """

    tokens: int
    ttft: float
    in_place: float
    alone: float
    handed_over_own: float
    behind: float
    token: float


ASKED_OF = ("ttft", "in_place", "alone", "handed_over_own")


def change_of(plain: Row, guessed: Row) -> Change:
    """By medians."""
    median = {
        row.method: {name: statistics.median(getattr(row, name)) for name in _COMPARED} for row in (plain, guessed)
    }
    old, new = median[plain.method], median[guessed.method]
    share = {name: new[name] / old[name] - 1 for name in _COMPARED}
    in_place = (new["ttft_s"] + new["behind_s"]) / (old["ttft_s"] + old["behind_s"]) - 1
    own = new["handed_token_s"] / new["own_token_s"] - 1
    return Change(
        plain.tokens, share["ttft_s"], in_place, share["alone_s"], own, share["behind_s"], share["handed_token_s"]
    )


def verdict_of(change: Change) -> str:
    """A line: each share, and which of those asked for exceed what is asked."""
    shares = {name: value for name, value in asdict(change).items() if name != "tokens"}
    missed = [name for name in ASKED_OF if shares[name] > ASKED]
    told = ", ".join(f"{name.replace('_', ' ')} {value:+.1%}" for name, value in shares.items())
    return f"{change.tokens} tokens, with guesses over without: {told}; " + (
        f"more than {ASKED:.0%}: {', '.join(missed)}" if missed else f"within {ASKED:.0%}"
    )


class Comparison:
    """One prefill engine and decode engines by their method of guessing."""

    def __init__(
        self, source: DrivenEngine, targets: dict[str, DrivenEngine], vocab_size: int, *, on_gpu: bool
    ) -> None:
        self._source, self._targets, self._vocab_size, self._on_gpu = source, targets, vocab_size, on_gpu
        self._count = 0

    def measure(self, length: int, rounds: int, answers: int) -> list[Row]:
        """Prompts of one length; the engines take turns."""
        rows = {method: Row(method, length) for method in self._targets}
        for method in self._targets:  # kernels of this length, and what steps take
            self._answers(Row(method, length))
        before = {method: self._received_s(method) for method in rows}
        for number in range(rounds):
            for method in _in_turn(list(rows), number):
                self._hand_off(rows[method])
        for number in range(answers):
            for method in _in_turn(list(rows), number):
                self._answers(rows[method], own_first=number % 2 == 1)
        for method, row in rows.items():
            # Each round hands over twice, each answer once.
            received_s = self._received_s(method) - before[method]
            row.moved_s = self._moved_s(row, received_s, 2 * rounds + answers) if self._on_gpu else 0.0
        return list(rows.values())

    def _hand_off(self, row: Row) -> None:
        """A prompt that nobody has seen, and once more what is computed of it."""
        prompt, target = self._prompt(row.tokens), self._targets[row.method]
        time.sleep(REST_S)  # a GPU that is busy lowers its clock within 0.1 s
        row.add(hand_over(self._source, target, prompt, self._name()))
        row.alone_s.append(hand_over(self._source, target, prompt, self._name()).chunks_s)

    def _answers(self, row: Row, *, own_first: bool = False) -> None:
        """A long answer behind a hand-off, and one to the same prompt by the decode engine alone, which caches nothing.

        To the same one, since how many guesses are right differs more from prompt to prompt than what is compared.
        """
        before, prompt, target = self._stats(row.method), self._prompt(row.tokens), self._targets[row.method]
        for is_own in (own_first, not own_first):
            time.sleep(REST_S)
            if is_own:
                answer = target.answer(prompt, self._name(), ANSWER_TOKENS)
                row.own_token_s.append(answer.token_s)
                token_ids = answer.token_ids
            else:
                handed = hand_over(self._source, target, prompt, self._name(), ANSWER_TOKENS)
                row.add(handed)
                row.handed_token_s.append(handed.token_s)
                token_ids = handed.token_ids
            row.are_equal.append(token_ids == [prompt[-1] + 1 + place for place in range(ANSWER_TOKENS)])
        now = self._stats(row.method)
        row.drafted += now.drafted_tokens.total - before.drafted_tokens.total
        row.accepted += now.accepted_tokens.total - before.accepted_tokens.total

    def _moved_s(self, row: Row, received_s: float, num_received: int) -> float:
        target = self._targets[row.method]
        ray.get(target.actor.look.remote())
        for _ in range(LOOKS):
            hand_over(self._source, target, self._prompt(row.tokens), self._name())
        return moved_s(ray.get(target.actor.copies.remote()), LOOKS, received_s, num_received)

    def _stats(self, method: str) -> EngineStats:
        found: EngineStats = ray.get(self._targets[method].actor.stats.remote())
        return found

    def _received_s(self, method: str) -> float:
        found: TransferStats = ray.get(self._targets[method].actor.transfer_stats.remote())
        return found.receive_s

    def _name(self) -> str:
        self._count += 1
        return f"g{self._count}"

    def _prompt(self, length: int) -> tuple[int, ...]:
        """One that nobody has seen."""
        self._count += 1
        return edited_prompt(length, 1_000_003 * self._count + length, self._vocab_size)


def _in_turn(methods: list[str], number: int) -> list[str]:
    """Either goes first in turn."""
    return methods[::-1] if number % 2 else methods


def bench_guesses(options: argparse.Namespace) -> int:
    """Start the engines, measure, print."""
    num_gpus = 0 if options.shape == "tiny" else min(2, torch.cuda.device_count())
    device = f"{num_gpus} x {torch.cuda.get_device_name()}" if num_gpus else "no GPU"
    ray.init(num_cpus=8, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False)
    begun_s = time.perf_counter()
    engines = _start(options, num_gpus)
    source, targets = engines[PLAIN, 0], {method: engines[method, 1] for method in (PLAIN, options.speculation)}
    print(f"{device}, torch {torch.__version__}, ray {ray.__version__}: ready in {time.perf_counter() - begun_s:.1f} s")
    comparison = Comparison(source, targets, shape_of(options.shape).vocab_size, on_gpu=num_gpus > 0)
    rows, changes = [], []
    print(HEADING, flush=True)
    for length in options.lengths or LENGTHS:
        pair = comparison.measure(length, options.rounds or 6, options.answers)
        changes.append(change_of(*pair))
        rows += pair
        print("\n".join([*map(line_of, pair), verdict_of(changes[-1])]), flush=True)
    for engine in targets.values():
        stats = ray.get(engine.actor.stats.remote())
        assert stats.num_used_blocks == 0, stats
    ray.shutdown()
    result = {"device": device, "shape": options.shape, "way": _way(options), "parts": options.parts[0]}
    print(json.dumps(result | {"rows": [asdict(row) for row in rows], "changes": [asdict(one) for one in changes]}))
    return 0 if all(all(row.are_equal) for row in rows) else 1


def _way(options: argparse.Namespace) -> str:
    way: str = (options.ways or ("cuda_ipc",))[0]
    return way


def _start(options: argparse.Namespace, num_gpus: int) -> dict[tuple[str, int], DrivenEngine]:
    """The prefill engine, of rank 0, and both decode engines, all at once: each takes half a minute."""
    # On two GPUs the first one has one for itself, and the others what is left.
    shares = ((0.0, 0.0), (0.3, 0.3), (1.0, 0.5))[num_gpus]
    wanted = ((PLAIN, 0), (PLAIN, 1), (options.speculation, 1))
    actors: dict[tuple[str, int], Any] = {}
    for number, (method, rank) in enumerate(wanted):
        config = config_of(rank, _way(options) == "cuda_ipc", options.steps, options.parts[0], method)
        if options.shape == "tiny":
            config = config.model_copy(update={"kv_cache_bytes": 64 << 20})
        sockets = options.sockets or num_gpus == 1
        actors[method, rank] = start(number, config, partial(build, options.shape), shares[rank], sockets=sockets)
    return {key: DrivenEngine(actor) for key, actor in actors.items()}
