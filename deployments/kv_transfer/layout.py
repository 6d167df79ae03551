"""What a KV chunk is made of. Two engines may hand KV over only if they agree on all of it. Knows no tensors."""

from dataclasses import dataclass

from deployments.errors import LayoutMismatchError
from deployments.kv_groups import KVGroups, bytes_per_block, bytes_per_token, differences, only_group

_BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and meaning of one engine's KV.

    Attributes:
        model: fingerprint of model and weights; KV of another model has the right shape and gives wrong tokens.
        dtype: of the elements: float32, bfloat16 or float16.
        block_size: tokens per block.
        groups: of layers.
    """

    model: str
    dtype: str
    block_size: int
    groups: KVGroups

    def __post_init__(self) -> None:
        if self.dtype not in _BYTES_PER_ELEMENT:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(_BYTES_PER_ELEMENT)}")

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return bytes_per_token(self.groups, _BYTES_PER_ELEMENT[self.dtype])

    @property
    def bytes_per_block(self) -> int:
        return bytes_per_block(self.groups, self.block_size, _BYTES_PER_ELEMENT[self.dtype])

    def chunk_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of a chunk's tensor, see `KVGroup`."""
        return only_group(self.groups).chunk_shape(num_blocks, self.block_size)

    def check_compatible(self, theirs: "KVLayout") -> None:
        """Raise `LayoutMismatchError` that names all in which the other engine's KV differs, the first one first."""
        if self == theirs:
            return
        differing = [
            f"{name}: ours {getattr(self, name)!r}, theirs {getattr(theirs, name)!r}"
            for name in ("model", "dtype", "block_size")
            if getattr(self, name) != getattr(theirs, name)
        ]
        differing += differences(self.groups, theirs.groups)
        raise LayoutMismatchError("engines disagree on the layout of KV: " + "; ".join(differing))
