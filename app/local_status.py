"""What a service does, in a terminal: `python -m app.local status`, `make status`.

Asks the service for what its live page shows (`/live`) and lays it out; knows the names of that document's fields and
nothing else of the service.
"""

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from app.local_checks import LocalError
from app.local_process import RunFolder

KEY_VARIABLE = "KVRELAY_API_KEY"
_PERIOD_S = 2.0
_TIMEOUT_S = 10.0
_NUM_DECISIONS = 3
_NONE = "-"
_STYLES = {"busy": "green", "idle": "default", "silent": "bold yellow", "gone": "bold red"}
_EVENTS = {"gone": "is gone", "flipped": "flipped to this pool"}
_ORIGINS = {
    "decode_cache": "cached in decode",
    "prefill_cache": "cached in prefill",
    "tier": "from the tier",
    "prefill": "computed by prefill",
    "decode": "computed by decode",
}

Json = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `status`."""
    parser.add_argument("--watch", action="store_true", help=f"show it anew every {_PERIOD_S:g} s, until Ctrl-C")
    parser.add_argument("--url", help="of a service that runs elsewhere (default: the server of this folder)")
    parser.epilog = f"Where the service has keys, {KEY_VARIABLE} names one that may read its metrics."


def show_status(folder: RunFolder, url: str | None, *, watch: bool) -> None:
    """Print what a service does; with `watch` until Ctrl-C. Of the server of this folder at least whether it answers.

    Raises:
        LocalError: nothing is served, or there is nothing to watch.
    """
    console = Console(highlight=False, markup=False)
    is_ours = url is None
    url = _say_server(folder, console) if url is None else url.rstrip("/")
    if not watch:
        console.print(_look(url) if is_ours else _lay_out(_read(url)))
        return
    with suppress(KeyboardInterrupt):  # the way to end it
        _watch(url, console)


def _watch(url: str, console: Console) -> None:
    document = _read(url)
    if not console.is_terminal:  # as a pipe: one after the other
        console.print(_lay_out(document))
        while True:
            time.sleep(_PERIOD_S)
            console.print(_look(url))
    with Live(_lay_out(document), console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(_PERIOD_S)
            live.update(_look(url), refresh=True)


def _say_server(folder: RunFolder, console: Console) -> str:
    """Say whether the server of this folder answers; its address."""
    server = folder.server()
    if server is None:
        raise LocalError("no server runs; start one: make serve")
    health = "answers" if server.is_healthy() else "does not answer /health"
    console.print(f"the server at {server.url} {health} (pid {server.pid}, log: {folder.log})", soft_wrap=True)
    return server.url


def _read(url: str) -> Json:
    """The document.

    Raises:
        LocalError: there is none to be had, and why.
    """
    headers = {"Authorization": f"Bearer {key}"} if (key := _key()) else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/live", headers=headers), timeout=_TIMEOUT_S) as told:
            document = json.load(told)
    except urllib.error.HTTPError as error:
        wanted = f"; set {KEY_VARIABLE} to a key with metrics = true" if error.code in (401, 403) else ""
        raise LocalError(f"{url}/live answers {error.code} {error.reason}{wanted}") from None
    except ValueError as error:
        raise LocalError(f"{url}/live is no JSON, so this is no kvrelay: {error}") from None
    except OSError as error:
        raise LocalError(f"nothing answers at {url}: {getattr(error, 'reason', error)}") from None
    if not isinstance(document, dict) or "pools" not in document:
        raise LocalError(f"what {url}/live answers is not of kvrelay")
    return document


def _key() -> str:
    """The caller's key; empty: there is none.

    Raises:
        LocalError: no header can carry it. What it is stays untold.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise LocalError(
            f"{KEY_VARIABLE} has a character that no header can carry (a line break, a long dash, an unseen space); "
            "set it anew"
        )
    return key


def _look(url: str) -> RenderableType:
    """The numbers, or why there are none."""
    try:
        return _lay_out(_read(url))
    except LocalError as error:
        return Text(str(error), style="bold red")


def _lay_out(document: Json) -> RenderableType:
    """The list of replicas last: it may be longer than a terminal is high, which then shows the beginning of it."""
    lines = [Text(line) for line in _lines(document)]
    return Group(_headline(document), _figures(document), *lines, _replicas(document))


def _headline(document: Json) -> Text:
    health = document["health"]
    is_ok = health["status"] == "ok"
    text = Text(f"{document['model']}  ", style="bold")
    text.append(f"{document['mode']}, kvrelay {document['version']}  ", style="dim")
    words = ": ".join(filter(None, ["serving" if is_ok else "cannot serve", health["reason"]]))
    return text.append(words, "green" if is_ok else "bold red")


def _figures(document: Json) -> Table:
    latency, tokens = document["latency"], document["tokens"]
    table = _table("last " + _seconds(document["window_s"]), "p50", "p95", "p99", "number of")
    for name, words in (("ttft_s", "time to first token"), ("itl_s", "gap between tokens")):
        of = latency[name]
        table.add_row(words, *(_seconds(of[quantile]) for quantile in ("p50", "p95", "p99")), _count(of["count"]))
    ratio = _NONE if tokens["ratio"] is None else f"{tokens['ratio']:.1f} : 1"
    table.add_section()
    table.add_row(
        "prefill : decode tokens", ratio, "", "", f"{_count(tokens['prompt'])} : {_count(tokens['generated'])}"
    )
    per_s = f"{_count(tokens['computed_per_s'])} + {_count(tokens['generated_per_s'])}"
    table.add_row("tokens/s, computed + generated", per_s)
    return table


def _replicas(document: Json) -> Table:
    table = _table("replica", "state", "queued tok", "running", "KV in use", "tokens/s", num_left=2)
    for pool, told in document["pools"].items():
        table.add_section()
        states = ", ".join(f"{count} {state.lower()}" for state, count in told["states"].items())
        table.add_row(Text(pool, "bold"), Text(states, "dim"))
        for replica in told["replicas"]:
            table.add_row(Text(f"  {replica['name']}"), _state(replica), *_load(replica))
    return table


def _state(replica: Json) -> Text:
    state, since = str(replica["state"]), f"{replica['since_s']:.0f} s"
    words = {"silent": f"silent for {since}", "gone": f"gone {since} ago"}.get(state, state)
    return Text(words, style=_STYLES.get(state, "default"))


def _load(replica: Json) -> Iterable[str]:
    if replica["state"] == "gone":
        return ()
    share = replica["kv_used_blocks"] / replica["kv_blocks"] if replica["kv_blocks"] else 0.0
    return (
        _count(replica["queued_tokens"]),
        f"{replica['num_running']} of {replica['max_running']}",
        f"{share:.0%}",
        _count(replica["prompt_tokens_per_s"] + replica["generated_tokens_per_s"]),
    )


def _lines(document: Json) -> Iterable[str]:
    """What no table has, a line for each."""
    where = document["prompts"]["tokens"]
    if total := sum(where.values()):
        shares = (f"{words} {where[name] / total:.0%}" for name, words in _ORIGINS.items() if where[name])
        yield f"prompts: {', '.join(shares)}"
    handoff = document["handoff"]
    if handoff["requests"] or handoff["failures"]:
        yield _handoff_line(handoff)
    for refused in document["refusals"]:
        yield f"refused: {refused['count']} ({refused['reason']}, {refused['priority']} priority)"
    for decision in document["planner"]["decisions"][-_NUM_DECISIONS:]:
        targets = ", ".join(f"{pool} {count}" for pool, count in decision["targets"].items())
        yield f"planner, {_clock(decision['at_s'])}: {targets}. {decision['reason']}"
    for event in document["events"][-_NUM_DECISIONS:]:
        words = _EVENTS.get(event["kind"], "serves")
        yield f"{_clock(event['at_s'])}: {event['pool']} replica {event['replica']} {words}"


def _handoff_line(handoff: Json) -> str:
    share = handoff["hidden_share"]
    hidden = "" if share is None else f", {share:.0%} hidden"
    size_mb = handoff["bytes"] / 1e6
    return f"hand-offs: {_count(handoff['requests'])}, {size_mb:.1f} MB{hidden}, {handoff['failures']} failed"


def _table(*headings: str, num_left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < num_left else "right", overflow="fold")
    return table


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.0f} min"


def _count(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            return f"{value / (factor if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _clock(unix_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_s))
