"""What others are told of an engine, and what it is given to run on: plain values, for processes that load no model."""

from dataclasses import dataclass

from deployments.engine.scheduling.positions import FIXED, PositionRule
from deployments.engine.scheduling.retention import Retention


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a front must know of its engine.

    Attributes:
        path: folder or hub id of the model, tokenizer included.
        max_model_len: tokens of prompt plus output.
        vocab_size: ids are below this.
        eos_token_ids: ids that end a text, as far as the model's configuration says.
        block_size: tokens per KV block.
        bytes_per_block: KV of so many tokens, all layers.
        lease_s: see `EngineConfig`.
        pid: of the engine's process, on its own node.
        num_blocks: KV blocks in the pool.
        positions: what tells KV of one prefix apart, as the model's rotary embedding has it.
        kv: names model and kind of its KV; engines with different names cannot hand over. Empty: not known.
        has_tier: whether it takes KV from the shared tier, too.
        model: as it was set. Empty: not known.
        kv_windows: see `EngineLimits`.
    """

    path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    bytes_per_block: int
    lease_s: float
    pid: int
    num_blocks: int
    positions: PositionRule = FIXED
    kv: str = ""
    has_tier: bool = False
    model: str = ""
    kv_windows: tuple[int | None, ...] = (None,)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that model and pool take."""
        return Retention(self.block_size, self.kv_windows).longest(self.num_blocks, self.max_model_len)


@dataclass(frozen=True, slots=True)
class EngineResources:
    """What Ray sets aside for an engine's process.

    Attributes:
        num_cpus: logical CPUs.
        num_gpus: GPUs.
        custom: custom resources by name.
    """

    num_cpus: float
    num_gpus: float
    custom: dict[str, float]
