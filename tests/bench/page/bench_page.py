"""What the live page costs the service: CPU of all its processes while it is watched, and while it is not, in turn.

Run: `make bench-page`. Prints a table and, as its last line, one JSON list with every raw number. The engine keeps
time and has no model; all the rest is what `make serve` starts. Whoever watches does as the page does: it loads the
files, and then asks for the numbers every 2 seconds.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx

from deployments.api.live_page import ASSETS
from tests.bench.page.at_work import Shift, Work, at_work
from tests.bench.serving.client import completion
from tests.bench.serving.server import MeasuredServer

PERIOD_S = 2.0  # of the page
WATCHERS = (0, 1, 5)
# Of a stream, and of the engine for each of them.
NUM_TOKENS, PERIOD_US = 200, 20_000
TIMEOUT_S = 60.0
# What a start leaves to be done is not the page's cost.
SETTLING_S = 5.0


def watching(url: str) -> Work:
    """As an open page does."""

    def watch(_: int, shift: Shift) -> None:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            for path in ("/", *(f"/live/{name}" for name in ASSETS)):
                client.get(path).raise_for_status()
            shift.begin()
            while not shift.is_over.wait(PERIOD_S):
                client.get("/live").raise_for_status()

    return watch


def streaming(url: str) -> Work:
    """One stream after the other, each read as it comes."""

    def stream(_: int, shift: Shift) -> None:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            is_first = True
            while not shift.is_over.is_set():
                with client.stream("POST", "/v1/completions", json=completion(NUM_TOKENS, PERIOD_US)) as answer:
                    answer.raise_for_status()
                    for _piece in answer.iter_raw():
                        if is_first:
                            shift.begin()
                            is_first = False
                        if shift.is_over.is_set():
                            break

    return stream


def share_of(server: MeasuredServer, window_s: float) -> Counter[str]:
    """Of a core, by role, in percent."""
    before, began_s = server.cpu_s(), time.monotonic()
    time.sleep(window_s)
    used, seconds = server.cpu_s() - before, time.monotonic() - began_s
    return Counter({role: 100 * spent / seconds for role, spent in used.items()})


def measure(server: MeasuredServer, rounds: int, window_s: float, num_streams: int) -> list[dict[str, object]]:
    """In turn, so that what else the machine does meets all alike."""
    url, rows = f"http://127.0.0.1:{server.port}", list[dict[str, object]]()
    with at_work(num_streams, streaming(url)):
        for number in range(rounds):
            for num_watchers in WATCHERS if number % 2 == 0 else reversed(WATCHERS):
                with at_work(num_watchers, watching(url)):
                    used = share_of(server, window_s)
                row = {"streams": num_streams, "watchers": num_watchers, "percent": used.total(), "by_role": used}
                rows.append(row | {"load": os.getloadavg()[0]})
                print(f"{num_streams} streams, {num_watchers} pages: {used.total():.2f} % of a core", flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="how often each is looked at (default: %(default)s)")
    parser.add_argument("--window", type=float, default=20.0, help="seconds of a look (default: %(default)s)")
    parser.add_argument("--streams", type=int, nargs="*", default=[0, 4], help="that run meanwhile")
    parser.add_argument("--port", type=int, default=8234)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = MeasuredServer(Path(folder), "ours", options.port, {})
        try:
            time.sleep(SETTLING_S)
            rows = [row for n in options.streams for row in measure(server, options.rounds, options.window, n)]
        finally:
            server.stop()
    print("\nstreams  pages  % of a core (median)  above no page")
    for num_streams in options.streams:
        shares = {
            n: [float(str(r["percent"])) for r in rows if (r["streams"], r["watchers"]) == (num_streams, n)]
            for n in WATCHERS
        }
        for num_watchers, found in shares.items():
            above = median(found) - median(shares[0])
            print(f"{num_streams:7d}  {num_watchers:5d}  {median(found):20.2f}  {above:13.2f}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
