"""Steps as recorded parts: which run as one graph for single tokens and one for each prompt, and what graphs read.

Launched as a whole, a step reads the weights once, but this process has to launch several hundred kernels, and the GPU
waits for it where there is little to compute. The choice depends on the model, the kind of GPU and the step
alone, so that tokens repeat. Knows no tensor and no model. G groups of layers have slots and tables of their own.
"""
# mypy: disable-error-code="untyped-decorator"

import numpy as np

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.compiled import njit
from deployments.engine.execution.costs import StepCosts

# Of a chunk behind computed tokens; longer ones have a kernel that is faster than the recorded one (`LONG_CHUNK`).
MAX_CHUNK = 512
# Tokens in front of a chunk. Few programs read them, one after the other: more are left to kernels that split them.
MAX_CONTEXT = 16384


def recorded_prompts(arrays: StepArrays, costs: StepCosts) -> list[int]:
    """Tokens of a step's prompts and chunks, if it is to run as recorded parts; else none.

    Args:
        arrays: the step.
        costs: of the model.
    """
    first = arrays.num_singles
    counts, contexts = arrays.counts[first:], arrays.starts[first:]
    if not np.isin(arrays.draw_rows, np.cumsum(arrays.counts) - 1).all():
        return []  # there are drafts: see `verification.py`
    if counts[contexts > 0].max(initial=0) > MAX_CHUNK or contexts.max(initial=0) > MAX_CONTEXT:
        return []
    if arrays.num_runs > 1 and costs.parts_ms(arrays) > costs.launch_ms:
        return []
    found: list[int] = counts.tolist()
    return found


def fill_singles(columns: np.ndarray, tables: np.ndarray, arrays: StepArrays, batch_size: int) -> None:
    """Write what a graph of single tokens reads.

    Args:
        columns: (4 + G, at least batch_size): token ids, sources, positions, slots by the group, and lengths.
        tables: (at least batch_size, G, blocks of the longest sequence).
        arrays: of the step, whose prompts are left out.
        batch_size: of the graph; rows without a token have no length and go nowhere.
    """
    count, nowhere = arrays.num_singles, [-1] * len(arrays.slots)
    given = arrays.token_ids, arrays.sources, arrays.positions, *arrays.slots, arrays.single_lens
    for column, values, nothing in zip(columns, given, (0, -1, 0, *nowhere, 0), strict=True):
        column[:count] = values[:count]
        column[count:batch_size] = nothing
    tables[:count, :, : arrays.tables.shape[2]] = arrays.single_tables.swapaxes(0, 1)


def two_tokens(num_groups: int) -> StepArrays:
    """A step of one run of two tokens, with which what fills is compiled."""
    one, two = np.ones(1, dtype=np.int64), np.zeros(2, dtype=np.int64)
    slots, tables = np.zeros((num_groups, 2), np.int64), np.zeros((num_groups, 1, 1), np.int64)
    return StepArrays(two, one[:0], two, slots, one, 2 * one, tables, 0, two, two)


def fill_tokens(columns: np.ndarray, arrays: StepArrays, num_tokens: int) -> None:
    """Write what a graph reads of tokens that all draw, where sequences may have several.

    Args:
        columns: (4 + G, at least num_tokens): token ids, sources, positions, slots by the group, and which run each
            token is of.
        arrays: of the step.
        num_tokens: of the graph; behind those that there are they go nowhere, and are nobody's.
    """
    _fill_tokens(columns, num_tokens, arrays.token_ids, arrays.sources, arrays.positions, arrays.slots, arrays.counts)


# Compiled, for behind a step with drafts a GPU waits for them.
@njit(cache=True)
def _fill_tokens(
    columns: np.ndarray,
    num_tokens: int,
    token_ids: np.ndarray,
    sources: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    counts: np.ndarray,
) -> None:
    columns[:, :num_tokens] = -1
    columns[0, :num_tokens] = columns[2, :num_tokens] = 0
    token = 0
    for run, count in enumerate(counts):
        for _ in range(count):
            columns[0, token], columns[2, token], columns[-1, token] = token_ids[token], positions[token], run
            if token < len(sources):
                columns[1, token] = sources[token]
            for group in range(len(slots)):
                columns[3 + group, token] = slots[group, token]
            token += 1


def fill_runs(lens: np.ndarray, starts: np.ndarray, tables: np.ndarray, arrays: StepArrays, num_seqs: int) -> None:
    """Write what such a graph reads of the runs.

    Args:
        lens: (at least num_seqs,) tokens of each sequence, its run included.
        starts: (at least num_seqs + 1,) where each run begins.
        tables: (at least num_seqs, G, blocks of the longest sequence).
        arrays: of the step.
        num_seqs: of the graph; behind those that there are they have no length.
    """
    _fill_runs(lens[:num_seqs], starts[: num_seqs + 1], tables, arrays.starts, arrays.counts, arrays.tables)


@njit(cache=True)
def _fill_runs(
    lens: np.ndarray, starts: np.ndarray, tables: np.ndarray, firsts: np.ndarray, counts: np.ndarray, blocks: np.ndarray
) -> None:
    starts[0] = 0
    for run in range(len(lens)):
        is_there = run < len(counts)
        lens[run] = firsts[run] + counts[run] if is_there else 0
        starts[run + 1] = starts[run] + (counts[run] if is_there else 0)
        if is_there:
            for group in range(len(blocks)):
                for block in range(blocks.shape[2]):
                    tables[run, group, block] = blocks[group, run, block]


def fill_prompt(values: np.ndarray, arrays: StepArrays, run: int) -> None:
    """Write what the graph of a whole prompt reads.

    Args:
        values: ((2 + G) * length + 1,): token ids, positions, slots by the group, and which token's logits are wanted.
        arrays: of the step.
        run: of the prompt; it is no longer than the graph.
    """
    count, start = int(arrays.counts[run]), int(arrays.counts[:run].sum())
    columns = values[:-1].reshape(2 + len(arrays.slots), -1)
    token_ids, positions, slots = columns[0], columns[1], columns[2:]
    token_ids[:count] = arrays.token_ids[start : start + count]
    slots[:, :count] = arrays.slots[:, start : start + count]
    # Behind its end the last one: others may have no embedding.
    positions[:] = arrays.positions[start] + np.minimum(np.arange(len(positions)), count - 1)
    token_ids[count:], slots[:, count:] = 0, -1
    values[-1] = count - 1


def prompt_values(length: int, num_groups: int) -> int:
    """How many values the graph of a whole prompt reads."""
    return (2 + num_groups) * length + 1


def chunk_values(length: int, max_blocks: int, num_groups: int) -> int:
    """How many values the graph of a chunk reads."""
    return prompt_values(length, num_groups) + 3 + num_groups * max_blocks


def fill_chunk(values: np.ndarray, arrays: StepArrays, run: int, length: int) -> None:
    """Write what the graph of a chunk behind computed tokens reads.

    Args:
        values: (chunk_values,): what that of a whole prompt reads; where the chunk begins and ends; tokens of its
            sequence; and its blocks by the group.
        arrays: of the step.
        run: of the chunk; it is no longer than the graph.
        length: of the graph.
    """
    num_groups, _, width = arrays.tables.shape
    of_prompt, count = prompt_values(length, num_groups), int(arrays.counts[run])
    fill_prompt(values[:of_prompt], arrays, run)
    values[of_prompt : of_prompt + 3] = 0, count, int(arrays.starts[run]) + count
    tables = values[of_prompt + 3 :].reshape(num_groups, -1)
    tables[:, :width], tables[:, width:] = arrays.tables[:, run], 0
