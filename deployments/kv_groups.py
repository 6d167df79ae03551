"""What KV is made of, described once: for the engine that keeps it and for those that carry it. Knows no tensors.

Layers that keep as much of a sequence's KV form a group. A model of one kind of layer has one; a model that mixes
layers with a window and others has several, of as many layers each, that share one pool: a block of it holds some
tokens in the layers of one group. Their KV must be alike: `first_group` refuses the rest, and nothing else has to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TypeAlias

from deployments.errors import UnsupportedModelError

# Of a token in a layer: one vector of keys, one of values, of the same size.
_PARTS = 2
# The axis of a chunk's shape along which its blocks lie.
BLOCK_AXIS = 2


@dataclass(frozen=True, slots=True)
class KVForm:
    """How the numbers of KV are stored in pools and chunks.

    Attributes:
        name: of the form; engines that hand KV over must agree on it.
        element: torch's name of the type that tensors of KV have.
        element_bytes: of one element.
        scale_elements: that the scale of a head's numbers takes, one for each token's keys and for its values.
    """

    name: str
    element: str
    element_bytes: int
    scale_elements: int = 0

    def width(self, head_dim: int) -> int:
        """Elements of a head with its scale."""
        return head_dim + self.scale_elements


FP8 = KVForm("fp8", "uint8", 1, scale_elements=4)
KV_FORMS = {
    form.name: form
    for form in (
        KVForm("float32", "float32", 4),
        KVForm("bfloat16", "bfloat16", 2),
        KVForm("float16", "float16", 2),
        FP8,
    )
}


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV is alike, and kept for as long.

    Attributes:
        layers: their indices in the model, in the order in which blocks of the pool and of chunks hold them.
        num_kv_heads: KV heads of a layer.
        head_dim: elements of a head.
        window: tokens of a sequence whose KV is kept, the newest; None: all.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def bytes_per_token(self, form: KVForm) -> int:
        """Keys and values of one token in all of these layers."""
        return self.num_layers * _PARTS * self.num_kv_heads * form.width(self.head_dim) * form.element_bytes

    def chunk_shape(self, num_blocks: int, block_size: int, form: KVForm) -> tuple[int, int, int, int, int, int]:
        """Shape of so many of its blocks: (layers, key or value, blocks, tokens of a block, KV heads, width of a head).

        With scales the last three axes tell a block's size alone: codes come first, (tokens, KV heads, head_dim), then
        the scales, (KV heads, tokens) float32.
        """
        return (self.num_layers, _PARTS, num_blocks, block_size, self.num_kv_heads, form.width(self.head_dim))


# Those that keep all come first, and the first one has the most layers.
KVGroups: TypeAlias = tuple[KVGroup, ...]


def num_blocks_of(chunk_shape: Sequence[int]) -> int:
    """Blocks of a chunk of this shape; 0: no chunk has such a shape."""
    return chunk_shape[BLOCK_AXIS] if len(chunk_shape) > BLOCK_AXIS else 0


def layers_of_parts(cuts: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Of a chunk that is cut at these layers: the first one of each part, and the one behind its last."""
    return list(pairwise((0, *cuts, num_layers)))


def bytes_per_token(groups: KVGroups, form: KVForm) -> int:
    """Keys and values of one token in all layers."""
    return sum(group.bytes_per_token(form) for group in groups)


def bytes_per_block(groups: KVGroups, block_size: int, form: KVForm) -> int:
    """Some tokens in all layers: one block of each group."""
    return len(groups) * bytes_of_pool_block(groups, block_size, form)


def bytes_of_pool_block(groups: KVGroups, block_size: int, form: KVForm) -> int:
    """One block of a pool that these groups share."""
    return first_group(groups).bytes_per_token(form) * block_size


def windows_of(groups: KVGroups) -> tuple[int | None, ...]:
    """Of each group, tokens of a sequence whose KV is kept; None: all."""
    return tuple(group.window for group in groups)


def first_group(groups: KVGroups) -> KVGroup:
    """The one that all share blocks with: those of a pool have its shape.

    Raises:
        UnsupportedModelError: no pool keeps such KV.
    """
    if len({(group.num_kv_heads, group.head_dim) for group in groups}) == 1:
        return groups[0]
    kinds = "; ".join(
        f"layers {list(group.layers)}: {group.num_kv_heads} heads of {group.head_dim}" for group in groups
    )
    raise UnsupportedModelError(f"keys and values must have one shape in all layers; found {kinds}")


def differences(ours: KVGroups, theirs: KVGroups) -> Iterator[str]:
    """In which values two descriptions differ, the first one first; with both values of each."""
    if len(ours) != len(theirs):
        yield f"groups of layers: ours {len(ours)}, theirs {len(theirs)}"
        return
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        other = asdict(their)
        for name, value in asdict(our).items():
            if value != other[name]:
                yield f"{name} of group {i}: ours {value}, theirs {other[name]}"
