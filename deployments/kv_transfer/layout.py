"""What a KV chunk is made of. Two engines may hand KV over only if they agree on all of it. Knows no tensors."""

from dataclasses import dataclass
from hashlib import blake2b

from deployments.errors import LayoutMismatchError
from deployments.kv_groups import (
    KV_FORMS,
    KVForm,
    KVGroups,
    bytes_per_block,
    bytes_per_token,
    differences,
    first_group,
)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and meaning of one engine's KV.

    Attributes:
        model: fingerprint of model and weights; KV of another model has the right shape and gives wrong tokens.
        dtype: name of the form in which numbers are stored: float32, bfloat16, float16 or fp8.
        block_size: tokens per block.
        groups: of layers.
    """

    model: str
    dtype: str
    block_size: int
    groups: KVGroups

    def __post_init__(self) -> None:
        if self.dtype not in KV_FORMS:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(KV_FORMS)}")

    @property
    def name(self) -> str:
        """The same for engines that agree on all of it, and only for them."""
        groups = blake2b(repr(self.groups).encode(), digest_size=4).hexdigest()
        return f"{self.model}/{self.dtype}/{self.block_size}/{groups}"

    @property
    def form(self) -> KVForm:
        return KV_FORMS[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return bytes_per_token(self.groups, self.form)

    @property
    def bytes_per_block(self) -> int:
        """The same of a block of each group."""
        return bytes_per_block(self.groups, self.block_size, self.form)

    def chunk_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of a chunk's tensor, see `KVGroup`."""
        return first_group(self.groups).chunk_shape(num_blocks, self.block_size, self.form)

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
