"""How soon the pools hold nothing for a client that has left: a promise of a second, kept here and not in a test.

Run: `make bench-leaving`, on a machine that does nothing else. Brings the graph up as `make serve` does; then clients
come one after the other, each with a prompt of its own, and close their connection: streaming or not, amid the prompt
or amid the answer. Times from there until both pools report that they hold nothing, the question included. Prints a
line for each way to leave and, as its last line, one JSON object. Ends with 1 if any client was held longer than
`--bound`.
"""

import argparse
import json
import re
import socket
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from app.local_process import RunFolder
from load_tests.environment import describe
from tests.bench.progress import note
from tests.bench.service import serving

FOLDER = RunFolder(Path(".run/leaving"))
MODEL = "smollm2-135m-instruct"
HELD = ("running_sequences", "waiting_sequences", "reserved_sequences", "kv_blocks_used", "exported_blocks")
_HELD_LINE = re.compile(rf"^kvrelay_(?:{'|'.join(HELD)}){{.*}} (.*)$", re.MULTILINE)
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Way:
    """A way to leave.

    Attributes:
        name: of it.
        prompt_tokens: of its prompt.
        stream: whether the answer is streamed.
        stays_s: after it has asked.
    """

    name: str
    prompt_tokens: int
    stream: bool
    stays_s: float


WAYS = (
    Way("amid the prompt, streaming", 6000, True, 2.0),
    Way("amid the prompt", 6000, False, 2.0),
    Way("amid the answer, streaming", 90, True, 2.0),
    Way("amid the answer", 90, False, 4.0),
)


def held(port: int) -> float:
    """How much both pools hold for requests."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        return sum(map(float, _HELD_LINE.findall(response.read().decode())))


def leave(port: int, way: Way, first_id: int) -> float:
    """Come and leave; seconds until nothing is held."""
    prompt = [first_id, *range(1000, 1000 + way.prompt_tokens - 1)]
    fields = {"model": MODEL, "prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "stream": way.stream}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head + body)
        time.sleep(way.stays_s)
        if held(port) == 0:
            raise RuntimeError(f"{way.name}: nothing is held while the client is there: {client.recv(1000)!r}")
    left_s = time.monotonic()
    while held(port) > 0:
        if time.monotonic() - left_s > PATIENCE_S:
            raise RuntimeError(f"{way.name}: still held after {PATIENCE_S:.0f} s")
    return time.monotonic() - left_s


def main() -> int:
    """Measure; see the module for what comes back."""
    parser = argparse.ArgumentParser(prog="make bench-leaving ARGS=...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=8014)
    parser.add_argument("--bound", type=float, default=1.0, help="seconds")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of the application")
    options = parser.parse_args()
    freed_s: dict[str, list[float]] = {way.name: [] for way in WAYS}
    with serving(FOLDER, options.port, options.arguments):
        for round_ in range(options.rounds):
            note(f"round {round_ + 1} of {options.rounds}")
            for way in WAYS:
                freed_s[way.name].append(leave(options.port, way, 2000 + round_))
    for name, seconds in freed_s.items():
        print(f"{name:>28}  p50 {np.median(seconds):.2f} s  max {max(seconds):.2f} s")
    slowest_s = max(map(max, freed_s.values()))
    print(json.dumps({"about": describe(ways=list(map(asdict, WAYS))), "freed_s": freed_s, "slowest_s": slowest_s}))
    return 0 if slowest_s <= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
