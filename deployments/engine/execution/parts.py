"""Steps as recorded parts: which run as one graph for the decodes and one for each prompt, and what these graphs read.

Launched as a whole, a step reads the weights once, but this process has to launch several hundred kernels, and the GPU
waits for it where there is little to compute. The choice depends on the step alone, so that tokens repeat. Knows no
tensor and no model.
"""

import numpy as np

from deployments.engine.batch.arrays import StepArrays

# Launching a step takes 24 ms (Qwen3-0.6B) and 31 (Llama-3.1-8B in FP8); meanwhile the GPU replays the latter's 128
# decodes and one prompt of 512 tokens in 14 ms, or two of 256 in 17 (H100, 2026-11-28).
MAX_PROMPT_TOKENS, MAX_PROMPTS = 512, 2
# KV of decodes that a GPU reads in 5 ms: with more, it is at work for as long as a launch takes.
MAX_KV_BYTES = 16 << 30


def recorded_prompts(arrays: StepArrays, kv_token_bytes: int) -> list[int]:
    """Tokens of a step's prompts, if it is to run as recorded parts; else none.

    Args:
        arrays: the step.
        kv_token_bytes: KV of one token.
    """
    first = arrays.num_decodes
    counts: list[int] = arrays.counts[first:].tolist()
    if not np.array_equal(arrays.draw_rows, np.cumsum(arrays.counts) - 1) or arrays.starts[first:].any():
        return []  # there are parts of prompts, or drafts
    if arrays.num_runs == 1:
        return counts
    is_small = len(counts) <= MAX_PROMPTS and sum(counts) <= MAX_PROMPT_TOKENS
    return counts if is_small and int(arrays.decode_lens.sum()) * kv_token_bytes <= MAX_KV_BYTES else []


def fill_decodes(columns: np.ndarray, tables: np.ndarray, arrays: StepArrays, batch_size: int) -> None:
    """Write what a decode graph reads.

    Args:
        columns: (5, at least batch_size): token ids, sources, positions, slots and lengths.
        tables: (at least batch_size, blocks of the longest sequence).
        arrays: of the step, whose prompts are left out.
        batch_size: of the graph; rows without a decode have no length and go nowhere.
    """
    count = arrays.num_decodes
    given = arrays.token_ids, arrays.sources, arrays.positions, arrays.slots, arrays.decode_lens
    for column, values, nothing in zip(columns, given, (0, -1, 0, -1, 0), strict=True):
        column[:count] = values[:count]
        column[count:batch_size] = nothing
    tables[:count, : arrays.tables.shape[1]] = arrays.decode_tables


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
    positions[:] = arrays.positions[start] + np.arange(len(positions))
    token_ids[count:], slots[count:] = 0, -1
    values[-1] = count - 1
