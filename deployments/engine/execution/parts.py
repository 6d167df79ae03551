"""Steps as recorded parts: which run as one graph for single tokens and one for each prompt, and what graphs read.

Launched as a whole, a step reads the weights once, but this process has to launch several hundred kernels, and the GPU
waits for it where there is little to compute. The choice depends on the model and the step alone, so that tokens
repeat. Knows no tensor and no model.
"""

import numpy as np

from deployments.engine.batch.arrays import StepArrays
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
        columns: (5, at least batch_size): token ids, sources, positions, slots and lengths.
        tables: (at least batch_size, blocks of the longest sequence).
        arrays: of the step, whose prompts are left out.
        batch_size: of the graph; rows without a token have no length and go nowhere.
    """
    count = arrays.num_singles
    given = arrays.token_ids, arrays.sources, arrays.positions, arrays.slots, arrays.single_lens
    for column, values, nothing in zip(columns, given, (0, -1, 0, -1, 0), strict=True):
        column[:count] = values[:count]
        column[count:batch_size] = nothing
    tables[:count, : arrays.tables.shape[1]] = arrays.single_tables


def fill_tokens(columns: np.ndarray, arrays: StepArrays, num_tokens: int) -> None:
    """Write what a graph reads of tokens that all draw, where sequences may have several.

    Args:
        columns: (5, at least num_tokens): token ids, sources, positions, slots, and which run each token is of.
        arrays: of the step.
        num_tokens: of the graph; behind those that there are they go nowhere, and are nobody's.
    """
    count, sources = arrays.num_tokens, np.full(arrays.num_tokens, -1)
    sources[: arrays.num_singles] = arrays.sources
    owners = np.repeat(np.arange(arrays.num_runs), arrays.counts)
    given = arrays.token_ids, sources, arrays.positions, arrays.slots, owners
    for column, values, nothing in zip(columns, given, (0, -1, 0, -1, -1), strict=True):
        column[:count], column[count:num_tokens] = values, nothing


def fill_runs(lens: np.ndarray, starts: np.ndarray, tables: np.ndarray, arrays: StepArrays, num_seqs: int) -> None:
    """Write what such a graph reads of the runs.

    Args:
        lens: (at least num_seqs,) tokens of each sequence, its run included.
        starts: (at least num_seqs + 1,) where each run begins.
        tables: (at least num_seqs, blocks of the longest sequence).
        arrays: of the step.
        num_seqs: of the graph; behind those that there are they have no length.
    """
    count = arrays.num_runs
    lens[:count], lens[count:num_seqs] = arrays.starts + arrays.counts, 0
    starts[0], starts[1 : count + 1] = 0, np.cumsum(arrays.counts)
    starts[count + 1 : num_seqs + 1] = arrays.num_tokens
    tables[:count, : arrays.tables.shape[1]] = arrays.tables


def fill_prompt(values: np.ndarray, arrays: StepArrays, run: int) -> None:
    """Write what the graph of a whole prompt reads.

    Args:
        values: (3 * length + 1,): token ids, positions, slots, and which token's logits are wanted.
        arrays: of the step.
        run: of the prompt; it is no longer than the graph.
    """
    count, start = int(arrays.counts[run]), int(arrays.counts[:run].sum())
    token_ids, positions, slots = values[:-1].reshape(3, -1)
    token_ids[:count], slots[:count] = arrays.token_ids[start : start + count], arrays.slots[start : start + count]
    # Behind its end the last one: others may have no embedding.
    positions[:] = arrays.positions[start] + np.minimum(np.arange(len(positions)), count - 1)
    token_ids[count:], slots[count:] = 0, -1
    values[-1] = count - 1


def chunk_values(length: int, max_blocks: int) -> int:
    """How many values the graph of a chunk reads."""
    return 3 * length + 4 + max_blocks


def fill_chunk(values: np.ndarray, arrays: StepArrays, run: int, length: int) -> None:
    """Write what the graph of a chunk behind computed tokens reads.

    Args:
        values: (chunk_values,): what that of a whole prompt reads; where the chunk begins and ends; tokens of its
            sequence; and its blocks.
        arrays: of the step.
        run: of the chunk; it is no longer than the graph.
        length: of the graph.
    """
    of_prompt = 3 * length + 1
    fill_prompt(values[:of_prompt], arrays, run)
    count, (width, table) = int(arrays.counts[run]), (arrays.tables.shape[1], values[of_prompt + 3 :])
    values[of_prompt : of_prompt + 3] = 0, count, int(arrays.starts[run]) + count
    table[:width], table[width:] = arrays.tables[run], 0
