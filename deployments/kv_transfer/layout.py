"""What a KV chunk is made of. Two engines may hand KV over only if they agree on all of it. Knows no tensors."""

from dataclasses import asdict, dataclass

from deployments.errors import LayoutMismatchError

_BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and meaning of one engine's KV.

    Attributes:
        model: fingerprint of model and weights; KV of another model has the right shape and gives wrong tokens.
        dtype: of the elements: float32, bfloat16 or float16.
        block_size: tokens per block.
        num_layers: layers that keep KV.
        num_kv_heads: KV heads per layer.
        head_dim: elements per head.
    """

    model: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.dtype not in _BYTES_PER_ELEMENT:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(_BYTES_PER_ELEMENT)}")

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * _BYTES_PER_ELEMENT[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def chunk_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Shape of a chunk's tensor: (layers, key or value, blocks, tokens of a block, KV heads, head)."""
        return (self.num_layers, 2, num_blocks, self.block_size, self.num_kv_heads, self.head_dim)

    def check_compatible(self, theirs: "KVLayout") -> None:
        """Raise `LayoutMismatchError` that names every field in which the other engine's KV differs."""
        if self == theirs:
            return
        other = asdict(theirs)
        differing = [
            f"{name}: ours {ours!r}, theirs {other[name]!r}"
            for name, ours in asdict(self).items()
            if ours != other[name]
        ]
        raise LayoutMismatchError("engines disagree on the layout of KV: " + "; ".join(differing))
