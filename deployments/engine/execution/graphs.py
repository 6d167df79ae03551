"""CUDA graphs: which sizes are recorded, what belongs to one, and how it is recorded. Knows no model."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from deployments.engine.kv.layers import LayerWatch

# Between these a batch is padded to the next one.
_SMALL_BATCHES = (1, 2, 4, 8)
_BATCH_STEP = 16
MAX_GRAPH_BATCH = 512
# Single whole prompts are padded to the next of these. Launching a step of them takes a process as long as 1,000 to
# 1,600 tokens take the GPU (Llama-3.1-8B, beside four H100); longer ones gain by a graph only with smaller models.
PROMPT_LENGTHS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, *range(1024, 2049, 128))

MemoryPool = tuple[int, int]
Result = TypeVar("Result")


def ladder(max_batch: int) -> list[int]:
    """Batch sizes that are recorded, ending with the largest."""
    sizes = [size for size in (*_SMALL_BATCHES, *range(_BATCH_STEP, max_batch, _BATCH_STEP)) if size < max_batch]
    return [*sizes, max_batch]


def prompt_lengths(longest: int) -> list[int]:
    """Lengths of whole prompts, or chunks, that are recorded where a step has so many tokens at most."""
    shorter = [length for length in PROMPT_LENGTHS if length < longest]
    return [*shorter, *[length for length in PROMPT_LENGTHS if length >= longest][:1]]


def padded_batch(batch_size: int, max_batch: int) -> int:
    """The smallest size of the ladder that holds a batch."""
    if batch_size <= _SMALL_BATCHES[-1]:
        return min(next(size for size in _SMALL_BATCHES if size >= batch_size), max_batch)
    return min(-(-batch_size // _BATCH_STEP) * _BATCH_STEP, max_batch)


class SinglesGraph:
    """A step of single tokens alone, of a fixed batch size, recorded.

    Attributes:
        batch_size: rows of its inputs.
        graph: to replay.
        logits: (batch_size, vocab_size), of the last replay.
    """

    def __init__(self, batch_size: int, graph: torch.cuda.CUDAGraph, logits: Tensor) -> None:
        self.batch_size, self.graph, self.logits = batch_size, graph, logits


class GraphMarks:
    """Where a recorded step has come so far: events that each of its replays records anew. A `LayerWatch`.

    Args:
        ends: numbers of leading layers.
    """

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.ends = ends
        self._events = {end: torch.cuda.Event(external=True) for end in ends}

    def reach(self, num_layers: int, after: torch.cuda.Event | None = None, request_id: str | None = None) -> None:
        """See `LayerWatch`; while the step is recorded."""
        self._events[num_layers].record()

    def tell(self, watch: LayerWatch, request_id: str) -> None:
        """Behind a replay, and before the next one: that it was launched, for this request."""
        for end, event in self._events.items():
            watch.reach(end, event, request_id)


class PromptGraph:
    """A step of one whole prompt of up to a fixed length, or of such a chunk behind computed tokens, recorded.

    Args:
        length: of the prompt or chunk.
        inputs: what it reads, int32; see `fill_prompt` and `fill_chunk`. Slots are negative: it writes nowhere yet.
        num_groups: of layers.
        marks: that it sets; None: none.

    Attributes:
        graph: to replay, once `record` has filled it.
        logits: (1, vocab_size), of the last replay.
        holds: what else the graph reads.
    """

    def __init__(self, length: int, inputs: Tensor, num_groups: int, marks: GraphMarks | None = None) -> None:
        self.length, self.inputs, self.marks = length, inputs, marks
        self.inputs[2 * length : (2 + num_groups) * length] = -1
        self.graph = torch.cuda.CUDAGraph()
        self.logits: Tensor | None = None
        self.holds: object = None


def record(graph: torch.cuda.CUDAGraph, run: Callable[[], Result], pool: MemoryPool | None) -> Result:
    """Run once, then once more into a graph; gives back its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles kernels and warms up libraries, which a recording must not
    torch.cuda.current_stream().wait_stream(stream)
    # An engine that is over may wait for the collector: graphs that are reset while another is recorded spoil that one.
    with _no_collection(), torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]  # an opaque type of torch's
        return run()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running meanwhile."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()
