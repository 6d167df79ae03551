"""Hand-offs between two hosts over a link of a known rate: two network namespaces of this machine, and `tc` between.

Run: `make bench-handoff ARGS="--shaped 1gbit"`, as root. The transfer's own code (lines, questions, links, gloo), in a
process for each engine, without Ray and without a model. A receiver asks for a prompt, as a decode engine does, and
copies each chunk into a pool. "Plain" sends as many bytes as one message of gloo's. The two take turns.

"Whole" and "in parts" play a prompt that is computed at a given pace, the chunks of its last step whole or by layers;
"behind" runs from the end of that step until all is in the pool.
"""

import ctypes
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from queue import SimpleQueue
from threading import Barrier, Thread
from typing import Any

import torch
from torch import Tensor

from deployments.engine.handoff.outbox import Outbox
from deployments.engine.handoff.outgoing import Part
from deployments.kv_groups import KVGroup, num_blocks_of
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, build_group, host_store, join_store
from deployments.kv_transfer.inquiries import Announced, Answer, Answers, Heard, Inquiries, Want
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.line import LineHost, call
from deployments.kv_transfer.link import Link, Peer, Steps, Watchdog, until_over
from deployments.kv_transfer.notes import Note, decode
from deployments.kv_transfer.process import Counters
from deployments.kv_transfer.source import Source
from deployments.messages import DrawnToken

# SmolLM2-135M, as the engines of `bench_handoff` have it: 45 KiB per token, steps of 128 tokens.
LAYOUT = KVLayout("shaped", "float32", 16, (KVGroup(tuple(range(30)), 3, 64),))
CHUNK_TOKENS = 128
NUM_PARTS = 5
# Between two such steps on one core of the hardware in docs/measured.md.
STEP_S = 0.3
LENGTHS = (512, 2048, 8000)
PATIENCE_S = 600.0
CONFIG = TransferConfig(connect_timeout_s=PATIENCE_S, transfer_timeout_s=PATIENCE_S)
HOSTS = {"sources": "10.231.77.1", "receivers": "10.231.77.2"}
_CLONE_NEWNET = 0x40000000
_SECRET = "shaped"


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@contextmanager
def shaped_hosts(rate: str) -> Iterator[dict[str, str]]:
    """Two namespaces joined by a link that carries no more than this in either direction; their names by the side."""
    names = {side: f"kvrelay-{os.getpid()}-{side}" for side in HOSTS}
    ends = {side: f"kv{os.getpid() % 100000}{side[0]}" for side in HOSTS}
    try:
        for name in names.values():
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", ends["sources"], "type", "veth", "peer", "name", ends["receivers"])
        for side, name in names.items():
            _run("ip", "link", "set", ends[side], "netns", name)
            inside = "ip", "-n", name
            _run(*inside, "addr", "add", f"{HOSTS[side]}/24", "dev", ends[side])
            for device in ("lo", ends[side]):
                _run(*inside, "link", "set", device, "up")
            shape = "rate", rate, "burst", "256kb", "latency", "50ms"
            _run("tc", "-n", name, "qdisc", "add", "dev", ends[side], "root", "tbf", *shape)
        yield names
    finally:
        for name in names.values():  # and what is in them
            subprocess.run(("ip", "netns", "del", name), check=False, capture_output=True)


def bytes_per_s(rate: str) -> float:
    """Of a rate as `tc` takes it, in bits."""
    units = {"gbit": 1e9, "mbit": 1e6, "kbit": 1e3}
    unit = next((unit for unit in units if rate.endswith(unit)), None)
    if unit is None:
        raise ValueError(f"--shaped is {rate!r}, must end with one of {', '.join(units)}")
    return float(rate.removesuffix(unit)) * units[unit] / 8


class _Alive(Peer):
    """The other process, which nothing here kills."""

    def __init__(self) -> None:
        """As nobody asks it, it needs no actor."""

    def silent_s(self, interval_s: float) -> float:
        return 0.0


def _enter(namespace: str) -> None:
    """Have this thread, and those that it starts, live there."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    torch.set_num_threads(1)


def _chunks(num_tokens: int) -> list[int]:
    """Blocks of each chunk of a prompt."""
    edges = [*range(0, num_tokens, CHUNK_TOKENS), num_tokens]
    size = LAYOUT.block_size
    return [-(-end // size) - -(-start // size) for start, end in pairwise(edges)]


def _cuts(num_parts: int) -> tuple[int, ...]:
    num_layers = LAYOUT.groups[0].num_layers
    return tuple(i * num_layers // num_parts for i in range(1, num_parts))


def be_source(namespace: str, receivers: list[Any], commands: Any, ended_s: Any) -> None:
    """One prefill engine: holds the chunks that it is told to, and completes them at the pace that it is told."""
    _enter(namespace)
    source, outbox = Source(Watchdog(), Counters(), _describe), Outbox(10**9, lease_s=PATIENCE_S)
    links, groups, held = [], [], list[str]()
    for addresses in receivers:
        line_at, store_at = addresses.get(timeout=PATIENCE_S)
        line = call(line_at, _SECRET, PATIENCE_S)
        group = build_group("cpu", join_store(store_at, PATIENCE_S), 1, HOSTS["sources"], PATIENCE_S)
        link = Link("source", _Alive(), partial(Channel, group, line), CONFIG, lambda _: None)
        Thread(target=Answers(link, line, source).run, daemon=True).start()
        links.append(link)
        groups.append(group)
    while (command := commands.get()) is not None:
        what, *arguments = command
        if what == "plain":
            _move(groups[0].start_send(_bytes(arguments[0])))
        elif what == "drop":
            while held:
                source.let_go(held[-1])
                outbox.drop(held.pop())
        else:
            prompt, num_tokens, num_parts, is_paced = arguments
            held.append(prompt)
            parts = _hold(source, outbox, prompt, num_tokens, num_parts)
            if is_paced:
                Thread(target=_compute, args=(outbox, prompt, parts, ended_s), daemon=True).start()
            else:
                for index, _ in parts:
                    outbox.note_copied(prompt, index)
        commands.task_done()
    for link in links:
        link.close("the end")
    os._exit(0)  # gloo's threads may still wait for the other end, which is ending too


def _describe(part: Part) -> Note:
    return Note.of(part.chunk, part.num_parts, num_blocks_of(part.tensor.shape), None)


def _hold(source: Source, outbox: Outbox, prompt: str, num_tokens: int, num_parts: int) -> list[tuple[int, float]]:
    """Hold a prompt, of which nothing is complete.

    Returns:
        Of each part the number of its chunk, and how many steps have been taken when it is computed.
    """
    outbox.open(prompt, 0)
    handoff = outbox.take(prompt)
    assert handoff is not None
    source.hold(prompt, handoff)
    sizes, parts = _chunks(num_tokens), []
    for i, num_blocks in enumerate(sizes):
        is_last = i == len(sizes) - 1
        cuts, tensor = _cuts(num_parts) if is_last else (), torch.ones(LAYOUT.chunk_shape(num_blocks))
        chunk = outbox.put(prompt, num_blocks, tensor, is_last=is_last, cuts=cuts)
        parts += [(chunk.index, i + k / (len(cuts) + 1)) for k in range(1, len(cuts) + 2)]
    outbox.set_first_token(prompt, DrawnToken(0))
    return parts


def _compute(outbox: Outbox, prompt: str, parts: list[tuple[int, float]], ended_s: Any) -> None:
    begun_s = time.monotonic()
    for index, num_steps in parts:
        time.sleep(max(0.0, begun_s + num_steps * STEP_S - time.monotonic()))
        outbox.note_copied(prompt, index)
    ended_s.value = time.monotonic()


@cache
def _bytes(count: int) -> Tensor:
    """Memory that is there already."""
    return torch.zeros(count, dtype=torch.uint8)


def _move(wait: Any) -> None:
    for _ in until_over(wait, PATIENCE_S):
        pass


class _Receiver:
    """One decode engine with its sources."""

    def __init__(self, sources: list[Any]) -> None:
        self.pairs: list[tuple[Inquiries, Group]] = []
        self._pool = torch.empty(LAYOUT.chunk_shape(2 * CHUNK_TOKENS))
        for addresses in sources:
            host = HOSTS["receivers"]
            store, store_at = host_store(host, PATIENCE_S)
            with LineHost(host, _SECRET) as line_host:
                addresses.put((line_host.address, store_at))
                line = line_host.wait(PATIENCE_S)
            group, inquiries = build_group("cpu", store, 0, host, PATIENCE_S), Inquiries()
            Link("receiver", _Alive(), partial(Channel, group, line), CONFIG, lambda _: None, inquiries)
            self.pairs.append((inquiries, group))

    def pull(self, source: int, prompt: str) -> float:
        """Ask for a prompt; when the last of it is in the pool."""
        inquiries, _ = self.pairs[source]
        heard: SimpleQueue[Heard] = SimpleQueue()
        inquiries.ask(Want.SEND, prompt, heard.put, lambda text: partial(_receive, decode(text)))
        while isinstance(announced := heard.get(timeout=PATIENCE_S), Announced):
            assert announced.arriving is not None
            tensor = announced.arriving.result(PATIENCE_S)
            assert tensor is not None
            self._pool[: len(tensor), :, : tensor.shape[2]].copy_(tensor)
        assert announced is Answer.WHOLE, announced
        return time.monotonic()


def _receive(note: Note, group: Group, config: TransferConfig) -> Steps:
    shape = LAYOUT.chunk_shape(note.tensor_blocks)
    first, end = note.layers or (0, shape[0])
    tensor: Tensor = group.allocate((end - first, *shape[1:]), torch.float32)
    wait = group.start_recv(tensor)
    yield True
    yield from until_over(wait, PATIENCE_S)
    return tensor


def be_receiver(namespace: str, sources: list[Any], commands: Any, results: Any) -> None:
    """One decode engine: pulls what it is told to, from all sources at once, and says when it began and ended."""
    _enter(namespace)
    receiver = _Receiver(sources)
    while (command := commands.get()) is not None:
        what, *arguments = command
        begun_s = time.monotonic()
        if what == "plain":
            _move(receiver.pairs[0][1].start_recv(_bytes(arguments[0])))
            ended_s = time.monotonic()
        else:
            ended_s = max(_at_once([partial(receiver.pull, *each) for each in arguments]))
        results.put((begun_s, ended_s))
    os._exit(0)  # as the sources


def _at_once(calls: list[Any]) -> list[float]:
    found, barrier = [0.0] * len(calls), Barrier(len(calls))

    def run(i: int) -> None:
        barrier.wait()
        found[i] = calls[i]()

    threads = [Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class Mesh:
    """Sources and receivers in namespaces of their own; every source with every receiver.

    Args:
        namespaces: by the side.
        width: engines on either side.
    """

    def __init__(self, namespaces: dict[str, str], width: int) -> None:
        context = multiprocessing.get_context("spawn")
        addresses = [[context.Queue() for _ in range(width)] for _ in range(width)]  # by source, then receiver
        self._sources: Any = [context.JoinableQueue() for _ in range(width)]
        self._receivers: Any = [context.Queue() for _ in range(width)]
        self._results: Any = context.Queue()
        self._ended_s: Any = context.Value("d", 0.0)
        processes = [
            context.Process(
                target=be_source, args=(namespaces["sources"], addresses[s], self._sources[s], self._ended_s)
            )
            for s in range(width)
        ]
        for r in range(width):
            column = [addresses[s][r] for s in range(width)]
            arguments = namespaces["receivers"], column, self._receivers[r], self._results
            processes.append(context.Process(target=be_receiver, args=arguments))
        for process in processes:
            process.start()
        self._processes, self._addresses = processes, addresses  # both of whom others still read
        self._number = 0

    def plain_s(self, num_bytes: int) -> float:
        """Seconds of one message of gloo's, from the first source to the first receiver."""
        self._sources[0].put(("plain", num_bytes))
        self._receivers[0].put(("plain", num_bytes))
        begun_s, ended_s = self._results.get(timeout=PATIENCE_S)
        return float(ended_s - begun_s)

    def handoff_s(self, num_tokens: int) -> float:
        """Seconds of one prompt from each source to each receiver, whose KV is there."""
        prompts = self._hold(num_tokens, 1, is_paced=False)
        for r, receiver in enumerate(self._receivers):
            receiver.put(("pull", *((s, prompts[s][r]) for s in range(len(self._sources)))))
        times = [self._results.get(timeout=PATIENCE_S) for _ in self._receivers]
        return float(max(ended_s for _, ended_s in times) - min(begun_s for begun_s, _ in times))

    def behind_s(self, num_tokens: int, num_parts: int) -> float:
        """Seconds from the end of a prompt's last step until all of its KV is in the pool."""
        prompts = self._hold(num_tokens, num_parts, is_paced=True)
        self._receivers[0].put(("pull", (0, prompts[0][0])))
        _, ended_s = self._results.get(timeout=PATIENCE_S)
        return float(ended_s - self._ended_s.value)

    def close(self) -> None:
        """End the processes."""
        for queue in (*self._sources, *self._receivers):
            queue.put(None)
        for process in self._processes:
            process.join(60)

    def _hold(self, num_tokens: int, num_parts: int, is_paced: bool) -> list[list[str]]:
        """Have each source hold a prompt for each receiver; their names."""
        self._number += 1
        prompts = [[f"{self._number}-{s}-{r}" for r in range(len(self._receivers))] for s in range(len(self._sources))]
        for source, names in zip(self._sources, prompts, strict=True):
            source.put(("drop",))
            for name in names:
                source.put(("hold", name, num_tokens, num_parts, is_paced))
            source.join()
        return prompts


def bench_shaped(rate: str, num_rounds: int, lengths: list[int]) -> list[dict[str, Any]]:
    """Measure, and print rows of the table as they come."""
    per_s, rows = bytes_per_s(rate), list[dict[str, Any]]()
    print(f"{'tokens':>7} {'MiB':>6} {'plain':>7} {'hand-off':>9} {'2 x 2':>7} {'whole: behind':>14} {'in parts':>9}")
    for width in (1, 2):
        with shaped_hosts(rate) as namespaces:
            mesh = Mesh(namespaces, width)
            for num_tokens in lengths:
                row = next((row for row in rows if row["tokens"] == num_tokens), None)
                if row is None:
                    rows.append(row := {"tokens": num_tokens})
                _measure(mesh, width, num_tokens, num_rounds, row)
            mesh.close()
    for row in rows:
        _print(row, per_s)
    return rows


def _measure(mesh: Mesh, width: int, num_tokens: int, num_rounds: int, row: dict[str, Any]) -> None:
    row["bytes"] = num_bytes = sum(_chunks(num_tokens)) * LAYOUT.bytes_per_block
    mesh.handoff_s(num_tokens)  # memory is there from now on
    if width > 1:
        row["several_s"] = [mesh.handoff_s(num_tokens) for _ in range(num_rounds)]
        return
    mesh.plain_s(num_bytes)
    taken: dict[str, list[float]] = {"plain_s": [], "handoff_s": [], "whole_s": [], "parts_s": []}
    for _ in range(num_rounds):
        taken["plain_s"].append(mesh.plain_s(num_bytes))
        taken["handoff_s"].append(mesh.handoff_s(num_tokens))
        taken["whole_s"].append(mesh.behind_s(num_tokens, 1))
        taken["parts_s"].append(mesh.behind_s(num_tokens, NUM_PARTS))
    row |= taken


def _print(row: dict[str, Any], per_s: float) -> None:
    num_bytes, median = row["bytes"], {k: statistics.median(v) for k, v in row.items() if k.endswith("_s")}
    shares = [
        times * num_bytes / per_s / median[k] for k, times in (("plain_s", 1), ("handoff_s", 1), ("several_s", 4))
    ]
    print(
        "{:>7} {:>6.1f} {:>7.0%} {:>9.0%} {:>7.0%} {:>11.0f} ms {:>6.0f} ms".format(
            row["tokens"], num_bytes / 2**20, *shares, median["whole_s"] * 1e3, median["parts_s"] * 1e3
        ),
        flush=True,
    )
