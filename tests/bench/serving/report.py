"""The tables that people read."""

import statistics
from typing import Any

from tests.bench.serving.analysis import percentile

STREAMS = (1, 8, 32, 128, 256)
OFFERED_TOKENS_PER_S = (8_000, 12_000, 16_000, 20_000, 24_000, 28_000)

_COST_KEYS = ("tokens_per_s", "cpu_us_per_token", "above_idle_us_per_token", "client_us_per_token")
_FLAT_KEYS = ("tokens_per_s", "tokens_per_event", "cpu_us_per_token", "client_us_per_token")


def show(report: dict[str, Any]) -> None:
    """Print the figures of `measure`."""
    readings = report["idle_share_of_a_core"]
    idle = {name: statistics.median(reading[name] for reading in readings) for name in readings[0]}
    print("\nidle, share of a core: " + ", ".join(f"{name} {share:.1%}" for name, share in idle.items()))
    _show_cost(report["cost"])
    _show_flat_out(report["flat_out"])
    _show_latency(report)


def _show_cost(rows: list[dict[str, Any]]) -> None:
    _line("streams", "server", "tokens/s", "us/token", "above idle", "client us", "ratio", "above idle")
    for num_streams in STREAMS:
        medians = {}
        for name in ("ours", "ordinary"):
            taken = [row for row in rows if (row["server"], row["streams"]) == (name, num_streams)]
            medians[name] = [statistics.median(row[key] for row in taken) for key in _COST_KEYS]
        for name, values in medians.items():
            ratios = [f"{medians['ordinary'][i] / values[i]:.1f}" for i in (1, 2) if name == "ours"]
            _line(num_streams, name, *(f"{value:.0f}" for value in values), *ratios)


def _show_flat_out(rows: list[dict[str, Any]]) -> None:
    print("\n64 streams, flat out: tokens offered by the engine and tokens that arrive")
    _line("offered/s", "tokens/s", "per event", "us/token", "client us", "ingress us", "haproxy us", "ingress %")
    for rate in OFFERED_TOKENS_PER_S:
        taken = [row for row in rows if row["offered_tokens_per_s"] == rate]
        speed, per_event, cost, client = (statistics.median(row[key] for row in taken) for key in _FLAT_KEYS)
        roles = ("ingress", "haproxy")
        ingress, haproxy = (statistics.median(row["by_process_us"].get(role, 0.0) for row in taken) for role in roles)
        share = ingress * speed / 1e4
        _line(
            rate,
            f"{speed:.0f}",
            f"{per_event:.2f}",
            *(f"{value:.0f}" for value in (cost, client, ingress, haproxy, share)),
        )


def _show_latency(report: dict[str, Any]) -> None:
    print(f"\n{'added latency':>26} {'p50 ms':>8} {'p99 ms':>8} {'samples':>8}")
    for what, key in (("first token", "added_first_token_s"), ("ITL, 32 streams", "added_itl_s")):
        for name, samples in report[key].items():
            p50, p99 = (percentile(samples, share) * 1e3 for share in (0.5, 0.99))
            print(f"{what + ', ' + name:>26} {p50:>8.2f} {p99:>8.2f} {len(samples):>8}")
    print("\na prompt of 100,801 tokens beside 32 streams, plain and chat in turn")
    for row in report["long_prompt"]:
        before, during, grown = (row[key] * 1e3 for key in ("before_s", "during_s", "grown_s"))
        print(
            f"longest gap of a stream {before:.0f} ms before, {during:.0f} ms during; no stream's grew by more than "
            f"{grown:.0f} ms; answered in {row['answer_s']:.2f} s"
        )
    row = report["stalled_client"]
    print(
        f"\na client that does not read, beside 8 that do: dropped after {row['dropped_after_s']:.1f} s and "
        f"{row['tokens_until_dropped']} tokens; the ingress grew by {row['ingress_grew_by_bytes'] / 2**20:.1f} MiB;\n"
        f"the others got {row['tokens_per_s_of_others']:.0f} tokens/s, longest gap "
        f"{row['longest_gap_of_others_s'] * 1e3:.0f} ms ({row['longest_gap_before_s'] * 1e3:.0f} ms before)"
    )


def show_flags(rows: list[dict[str, Any]]) -> None:
    """Print the figures of `measure_flags`."""
    print(f"\n{'settings':>24} {'idle':>6} {'us/token':>9} {'first token ms, p50':>20} {'ITL ms, p99':>12}")
    for row in rows:
        cost = statistics.median(c["cpu_us_per_token"] for c in row["cost"])
        first, itl = percentile(row["first_s"], 0.5) * 1e3, percentile(row["itl_s"], 0.99) * 1e3
        print(f"{row['settings']:>24} {row['idle']:>6.1%} {cost:>9.0f} {first:>20.2f} {itl:>12.2f}")


def _line(*cells: object) -> None:
    print(" ".join(f"{cell!s:>10}" for cell in cells))
