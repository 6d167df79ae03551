"""Sequences of the steps that run before there are requests: all that may be asked of a draw is asked of theirs.

Called by `rehearsal.py`, which knows how many of them a step has, and how long they are.
"""

import time
from array import array
from dataclasses import dataclass, replace

from deployments.engine.config import EngineLimits
from deployments.engine.execution.base import Runner
from deployments.engine.sampling.penalties import MAX_CELLS
from deployments.engine.scheduling.block_tables import BlockTables
from deployments.engine.scheduling.ids import block_array, token_array
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import (
    MAX_LOGPROBS,
    Adjustments,
    GenerateRequest,
    Grammar,
    SamplingParams,
)

# Bounds of every kind, logits that are changed in each way, a grammar, and logprobs.
SAMPLING = SamplingParams(
    max_tokens=1,
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    adjustments=Adjustments(((0, 1.0),), repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    num_logprobs=MAX_LOGPROBS,
    grammar=Grammar("", (), "rehearsal"),
)
_NOT_ADJUSTED = replace(SAMPLING, adjustments=None)
# Logits are changed in pieces of some cells. While one is, the one before may still be there; more take no more memory.
_PIECES = 3


def rehearsed_mask(vocab_size: int) -> bytes:
    """Of a grammar that bars nothing, as `Sequence.mask`."""
    return b"\xff" * (-(-vocab_size // 32) * 4)


@dataclass(frozen=True, slots=True)
class RehearsedSequences:
    """Makes sequences; they share their arrays, since nothing is added to these.

    Attributes:
        token_ids: of the longest one.
        tables: its blocks.
        num_adjusted: so many of a step have penalties, which take as much memory as those of any number.
        mask: see `rehearsed_mask`.
    """

    token_ids: "array[int]"
    tables: BlockTables
    num_adjusted: int
    mask: bytes

    def sequence(
        self, number: int, start: int, end: int, num_drafts: int = 0, num_prompt_logprobs: int | None = None
    ) -> Sequence:
        """One that has `start` of `end` tokens behind it; all but the first token were generated."""
        sampling = SAMPLING if number < self.num_adjusted else _NOT_ADJUSTED
        return Sequence(
            GenerateRequest(f"rehearsal-{number}", (0,), sampling, num_prompt_logprobs=num_prompt_logprobs),
            Role.LOCAL,
            time.monotonic(),
            token_ids=self.token_ids if end == len(self.token_ids) else self.token_ids[:end],
            tables=self.tables,
            num_computed_tokens=start,
            mask=self.mask,
            draft_masks=(self.mask,) * num_drafts,
        )


def build_rehearsed_sequences(runner: Runner, limits: EngineLimits, vocab_size: int) -> RehearsedSequences:
    """Those of an engine's limits, in a pool that need not hold them: its blocks come again and again."""
    num_blocks = runner.cache.num_blocks
    table = block_array(block % num_blocks for block in range(-(-limits.max_model_len // limits.block_size)))
    return RehearsedSequences(
        token_array([0] * limits.max_model_len),
        BlockTables(*[table] * runner.cache.num_groups),
        _PIECES * (1 + MAX_CELLS // limits.max_model_len),
        rehearsed_mask(vocab_size),
    )
