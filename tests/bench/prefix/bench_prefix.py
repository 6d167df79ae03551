"""Conversations of several turns on two prefill and two decode replicas: routed by Ray Serve, and by cached prefixes.

Run: `make bench-prefix`. Brings the graph up as `make serve` does, once for each way, and plays the same conversations
to it: some groups share a system prompt, each turn repeats all before it, its answer included. Prints a table and, as
its last line, one JSON object. "reuse" is of the tokens that one infinite cache would have had: of each turn all of the
conversation before, of each first turn the system prompt of its group if it was asked for before.

With `ARGS="--scenario agentic"`, or the name of another scenario of the load tests, that is played instead, and the way
by cached prefixes has the shared tier as well (`scenarios.py`).

Before, some prompts of their own meet every engine: the first contact of two takes seconds.

Nothing is judged: what routing is worth depends on how busy the engines are, and two cores are shared by four.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from app.local import down, up
from app.local_process import RunFolder
from tests.bench.prefix.scenarios import Bench, report
from tests.bench.progress import note
from tests.bench.serving.client import post

FOLDER = RunFolder(Path(".run/prefix"))
MODEL = "smollm2-135m-instruct"
# Token ids that no tokenizer gives a meaning of its own.
FIRST_ID, LAST_ID = 1_000, 40_000
REPLICAS = [f"{pool}.{bound}_replicas=2" for pool in ("prefill", "decode") for bound in ("min", "max")]
# Four engines share the cores of this machine; nothing shall be refused for being slow.
ARGUMENTS = [*REPLICAS, "prefill.num_cpus=0.3", "decode.num_cpus=0.3", "ingress.max_ttft_s=600", "parity_check=false"]
WAYS = {"Ray Serve": ["routing.by_prefix=false"], "by prefix": []}


@dataclass(frozen=True, slots=True)
class Turn:
    """What a client saw of one request.

    Attributes:
        number: within its conversation, from 0.
        sent_s: since the conversations began.
        ttft_s: from sending to the first token.
        num_tokens: of its prompt.
        num_reusable: that one infinite cache would have had.
        num_cached: that nobody computed.
    """

    number: int
    sent_s: float
    ttft_s: float
    num_tokens: int
    num_reusable: int
    num_cached: int


class Clients:
    """Plays conversations, some at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._draw = random.Random(args.seed)
        self._systems = [self._tokens(args.system_tokens) for _ in range(args.groups)]
        self._asked: set[int] = set()
        self._begun_s = 0.0
        self.turns: list[Turn] = []

    async def warm_up(self) -> None:
        """Prompts that share nothing, so that every engine has met every other."""
        seats = asyncio.Semaphore(self._args.streams)

        async def ask(prompt: list[int]) -> None:
            async with seats:
                await self._ask(0, prompt, 0)

        await asyncio.gather(*[ask(self._tokens(self._args.system_tokens)) for _ in range(self._args.warm_up)])
        self.turns.clear()

    async def play(self) -> None:
        """All of them; each with pauses between its turns, in which its user reads and types."""
        self._begun_s = time.monotonic()
        order = [number % self._args.groups for number in range(self._args.conversations)]
        seats = asyncio.Semaphore(self._args.streams)
        async with asyncio.TaskGroup() as group:
            for system in order:
                group.create_task(self._converse(system, random.Random(self._draw.random()), seats))

    async def _converse(self, system: int, draw: random.Random, seats: asyncio.Semaphore) -> None:
        prompt, num_known = list(self._systems[system]), 0
        for number in range(self._args.turns):
            prompt += [draw.randrange(FIRST_ID, LAST_ID) for _ in range(self._args.turn_tokens)]
            async with seats:
                if number == 0 and system in self._asked:
                    num_known = self._args.system_tokens
                self._asked.add(system)
                answer = await self._ask(number, prompt, num_known)
            prompt += answer
            num_known = len(prompt) - 1  # nobody has computed the KV of the last token
            await asyncio.sleep(self._args.pause_s * draw.uniform(0.5, 1.5))

    async def _ask(self, number: int, prompt: list[int], num_known: int) -> list[int]:
        options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        rules = {"max_tokens": self._args.answer_tokens, "ignore_eos": True, "temperature": 0}
        reply = (await post(self._args.port, {"model": MODEL, "prompt": prompt} | rules | options)).reply
        await reply.done.wait()
        events = reply.events()
        choices = [(at_s, event["choices"][0]) for at_s, event in events if event.get("choices")]
        usage = events[-1][1]["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        sent_s = reply.sent_s - self._begun_s
        self.turns.append(Turn(number, sent_s, choices[0][0] - reply.sent_s, len(prompt), num_known, cached))
        return [token for _, choice in choices for token in choice["token_ids"]]

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


def run(args: argparse.Namespace, settings: Sequence[str]) -> tuple[list[Turn], float]:
    """Bring the service up, play, and bring it down; what clients saw, and how long it took."""
    up(FOLDER, "app:graph", args.port, None, 600, [*ARGUMENTS, *settings])
    try:
        time.sleep(args.settle_s)
        clients = Clients(args)
        return clients.turns, asyncio.run(_warm_up_and_play(clients))
    finally:
        down(FOLDER)


async def _warm_up_and_play(clients: Clients) -> float:
    """How long the conversations took, in seconds."""
    await clients.warm_up()
    begun_s = time.monotonic()
    await clients.play()
    return time.monotonic() - begun_s


def summarise(way: str, turns: Sequence[Turn], seconds: float) -> dict[str, float | str]:
    """Figures of all rounds of one way; first turns apart, for they are the same for all but the system prompt."""
    row: dict[str, float | str] = {"way": way, "requests": len(turns), "seconds": seconds}
    for name, chosen in (("first", [t for t in turns if t.number == 0]), ("next", [t for t in turns if t.number])):
        ttft_s = sorted(turn.ttft_s for turn in chosen)
        row |= {f"{name}_ttft_p{p}_s": ttft_s[min(len(ttft_s) - 1, len(ttft_s) * p // 100)] for p in (50, 90)}
    num_tokens, num_cached = sum(t.num_tokens for t in turns), sum(t.num_cached for t in turns)
    row["prompt_tokens"], row["computed_tokens"] = num_tokens, num_tokens - num_cached
    row["reuse"] = num_cached / sum(turn.num_reusable for turn in turns)
    return row


def main() -> int:
    """Measure both ways in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8137)
    parser.add_argument("--rounds", type=int, default=2, help="of both ways, every second one in reverse order")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--groups", type=int, default=3, help="of conversations with one system prompt")
    parser.add_argument("--warm-up", type=int, default=16, help="prompts before the conversations")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--streams", type=int, default=3, help="requests at a time")
    parser.add_argument("--system-tokens", type=int, default=400)
    parser.add_argument("--turn-tokens", type=int, default=100)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--pause-s", type=float, default=2.0, help="between turns, in the mean")
    parser.add_argument("--settle-s", type=float, default=3.0, help="before the first request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", help="of the load tests, in place of conversations")
    parser.add_argument("--ours", action="store_true", help="of a scenario, the way by cached prefixes alone")
    parser.add_argument("--load", type=float, default=1.0, help="multiplier of the scenario's arrivals")
    parser.add_argument("--duration", type=float, default=90.0, help="of the scenario, in seconds")
    parser.add_argument("--num-blocks", type=int, help="of each engine's pool, in a scenario; else what memory allows")
    parser.add_argument("--tier-bytes", type=int, default=2 << 30, help="of the tier, in a scenario")
    parser.add_argument("--object-bytes", type=int, default=4 << 20, help="of an object of the tier, in a scenario")
    args = parser.parse_args()
    if args.scenario:
        bench = Bench(args, ARGUMENTS, lambda: Clients(args).warm_up())
        bench.play(FOLDER)
        print(json.dumps({"arguments": vars(args)} | report(bench)))
        return 0
    found: dict[str, list[Turn]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for number in range(args.rounds):
        for way in list(WAYS)[:: -1 if number % 2 else 1]:
            note(f"round {number + 1} of {args.rounds}: {way}")
            turns, took_s = run(args, WAYS[way])
            found[way] += turns
            seconds[way] += took_s
    rows = [summarise(way, found[way], seconds[way]) for way in WAYS]
    print("TTFT, s     first turn p50     p90   next turns p50     p90     computed       of   reuse")
    for row in rows:
        print(
            f"{row['way']:12}{row['first_ttft_p50_s']:16.2f}{row['first_ttft_p90_s']:8.2f}{row['next_ttft_p50_s']:17.2f}"
            f"{row['next_ttft_p90_s']:8.2f}   {row['computed_tokens']:11}{row['prompt_tokens']:9}{row['reuse']:8.2f}"
        )
    raw = {way: [asdict(turn) for turn in found[way]] for way in WAYS}
    print(json.dumps({"arguments": vars(args), "ways": rows, "turns": raw}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
