"""Speculative decoding by lookup beside none, in one process, on the same weights and threads.

Run: `make bench-speculation`; on a GPU `bench_speculation_gpu` takes over. Prints its progress, a table, and as its
last line one JSON object with every raw number. Both take turns within each round, in another order every time; medians
are compared, and all tokens must be equal.

What counts are steps in which as many sequences as are told make tokens, and nothing else is computed: when one has
ended, another takes its place. Else a batch would be measured by the answers in it that are guessed the worst.

Tasks: `edit` asks for a text of some 600 tokens again with one name changed, `json` for records as JSON, `chat` for
free answers, drawn at temperature 0.8. Every round has other texts, so that nobody profits from a prefix cache.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.model.load import LoadedModel, load_model
from deployments.engine.model.resolve import resolve_model
from deployments.engine.process import configure_process
from deployments.engine.stats import EngineStats
from deployments.messages import GenerateRequest, SamplingParams, TokenOutput

NAMES = ("Marta", "Oskar", "Ines", "Tomas", "Vera", "Emil", "Klara", "Bruno", "Nadia", "Felix", "Agnes", "Jonas")
PLACES = ("the harbour", "the old mill", "the library", "the north gate", "the market", "the station", "the garden")
THINGS = ("a brass key", "a letter", "a map of the coast", "a basket of pears", "an oil lamp", "a grey coat", "a clock")
DEEDS = (
    "{name} walked to {place} before the others were awake, and carried {thing} under one arm.",
    "Nobody at {place} had seen {thing} for years, so {name} asked the oldest of them about it.",
    "When the rain began, {name} put {thing} on a shelf and waited near {place} until noon.",
    "It was said in {place} that {thing} belonged to {name}, though there was no proof of that.",
    "{name} sold {thing} to a stranger, who left it behind at {place} on the very same day.",
)
QUESTIONS = (
    "Tell me about the sea near {place}.",
    "What would you do with {thing} on a long journey?",
    "Write a short story about somebody called {name}.",
    "Why do people like to meet at {place}?",
)


@dataclass(frozen=True)
class Task:
    """What is asked, and how the answer is drawn."""

    name: str
    max_tokens: int
    temperature: float


TASKS = (Task("edit", 600, 0.0), Task("json", 400, 0.0), Task("chat", 200, 0.8))


@dataclass
class Row:
    """One task at one batch size: tokens per second round by round, and what became of drafts."""

    task: str
    batch: int
    plain: list[float] = field(default_factory=list)
    speculative: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    runs_with_drafts: int = 0
    are_equal: bool = True

    @property
    def speedup(self) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(b / a for a, b in zip(self.plain, self.speculative, strict=True))


def sentence(rng: random.Random, templates: tuple[str, ...]) -> str:
    names = {"name": rng.choice(NAMES), "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
    return rng.choice(templates).format(**names)


def question(task: Task, rng: random.Random) -> str:
    """Another one with every draw."""
    if task.name == "edit":
        text = " ".join(sentence(rng, DEEDS) for _ in range(26))
        return f"Write this text again, word for word, but call {NAMES[0]} Louisa.\n\n{text}"
    if task.name == "json":
        lines = [f"{rng.choice(NAMES)}, {rng.randrange(18, 80)}, {rng.choice(PLACES)}" for _ in range(14)]
        example = '[{"name": "Paul", "age": 40, "place": "the bridge"}, ...]'
        return f"Write each line as a JSON object, like {example}. Answer with JSON alone.\n\n" + "\n".join(lines)
    return sentence(rng, QUESTIONS) + f" Think of the number {rng.randrange(10_000)}."


class Contest:
    """Two engines and what they are asked."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(loaded.path)
        speculation = config.speculation.model_copy(update={"method": "ngram"})
        self._plain = Engine(loaded, config)
        self._speculative = Engine(loaded, config.model_copy(update={"speculation": speculation}))

    def prompts(self, task: Task, batch: int, seed: int) -> list[tuple[int, ...]]:
        rng = random.Random(seed)
        chats = [[{"role": "user", "content": question(task, rng)}] for _ in range(batch)]
        encode: Any = self._tokenizer.apply_chat_template
        return [tuple(encode(chat, add_generation_prompt=True, return_dict=True)["input_ids"]) for chat in chats]

    def race(self, row: Row, task: Task, seed: int) -> None:
        """One round: both answer the same, one after the other."""
        prompts = self.prompts(task, row.batch + row.batch // 2, seed)
        before = self._speculative.stats()
        runs = {}
        for name in ("plain", "speculative") if seed % 2 else ("speculative", "plain"):
            engine = self._plain if name == "plain" else self._speculative
            runs[name] = answer(engine, prompts, row.batch, task, seed)
        row.plain.append(runs["plain"][0])
        row.speculative.append(runs["speculative"][0])
        row.are_equal &= runs["plain"][1] == runs["speculative"][1]
        count_drafts(row, before, self._speculative.stats())


def count_drafts(row: Row, before: EngineStats, now: EngineStats) -> None:
    row.drafted += round(now.drafted_tokens.total - before.drafted_tokens.total)
    row.accepted += round(now.accepted_tokens.total - before.accepted_tokens.total)
    row.runs_with_drafts += sum(now.drafted_tokens.counts) - sum(before.drafted_tokens.counts)


def answer(
    engine: Engine, prompts: list[tuple[int, ...]], batch: int, task: Task, seed: int
) -> tuple[float, list[list[int]]]:
    """Tokens per second of steps of so many answers at once, and the tokens of all."""
    tokens: list[list[int]] = [[] for _ in prompts]
    num_begun, going, seconds, num_timed = 0, set[int](), 0.0, 0
    while engine.has_work or num_begun < len(prompts):
        while len(going) < batch and num_begun < len(prompts):
            sampling = SamplingParams(max_tokens=task.max_tokens, temperature=task.temperature, seed=seed)
            engine.add(GenerateRequest(f"r{num_begun}", prompts[num_begun], sampling))
            going.add(num_begun)
            num_begun += 1
        is_timed = len(going) == batch and all(tokens[number] for number in going)
        begun_s = time.perf_counter()
        events = [event for event in engine.step() if isinstance(event, TokenOutput)]
        if is_timed:
            seconds += time.perf_counter() - begun_s
            num_timed += sum(len(event.token_ids) for event in events)
        for event in events:
            tokens[int(event.request_id[1:])] += event.token_ids
            if event.finish_reason is not None:
                going.discard(int(event.request_id[1:]))
    return num_timed / seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], default=[t.name for t in TASKS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default=EngineConfig.model_fields["model"].default)
    parser.add_argument("--max-drafts", type=int, default=8)
    parser.add_argument("--all", action="store_true", help="try all drafts, whatever they are expected to bring")
    args = parser.parse_args()
    configure_process(args.threads)
    speculation = {"max_drafts": args.max_drafts, "is_adaptive": not args.all}
    settings = {"model": resolve_model(args.model), "num_threads": args.threads, "kv_cache_bytes": 512 << 20}
    config = EngineConfig.model_validate(settings | {"speculation": speculation})
    contest = Contest(load_model(config), config)
    rows = []
    print("| task | at once | plain tokens/s | speculative | ratio | drafts right | drafts per run | equal |")
    print("|---|---|---|---|---|---|---|---|")
    for task in (task for task in TASKS if task.name in args.tasks):
        for batch in args.batches:
            row = Row(task.name, batch)
            for number in range(args.rounds + 1):
                print(f"{task.name}, {batch} at once: round {number} of {args.rounds}", file=sys.stderr)
                # The first one warms up: how often drafts are right, and what steps take, is learned.
                contest.race(row if number else Row(task.name, batch), task, 1000 * batch + number)
            rows.append(row)
            report(row)
    machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    print(json.dumps(machine | {"rows": [asdict(row) | {"speedup": row.speedup} for row in rows]}))
    if not all(row.are_equal for row in rows):
        sys.exit("tokens differ")


def report(row: Row) -> None:
    plain, ours = map(statistics.median, (row.plain, row.speculative))
    right = row.accepted / row.drafted if row.drafted else 0.0
    tried = row.drafted / row.runs_with_drafts if row.runs_with_drafts else 0.0
    print(
        f"| {row.task} | {row.batch} | {plain:.1f} | {ours:.1f} | {row.speedup:.2f} | {right:.2f} | {tried:.1f} "
        f"| {'yes' if row.are_equal else 'NO'} |",
        flush=True,
    )


if __name__ == "__main__":
    if torch.cuda.is_available():
        from tests.bench import bench_speculation_gpu

        bench_speculation_gpu.main()
    else:
        main()
