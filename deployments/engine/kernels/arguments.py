"""What attention's kernels are told of a layer: how it rotates, what it makes of the scores, where its KV is."""

from typing import NamedTuple

from torch import Tensor


class HeadNorms(NamedTuple):
    """RMSNorms of single heads of queries and keys.

    Attributes:
        query: (head_dim,) weight of the queries' norm; see `rms_norm` of the kernels.
        key: of the keys' norm.
        eps: of both.
    """

    query: Tensor
    key: Tensor
    eps: float


class Rotation(NamedTuple):
    """How queries and keys still have to be rotated.

    Attributes:
        cos: (1, T, at least num_dims // 2); of a pair of dimensions in its column.
        sin: as cos.
        num_dims: leading dimensions of a head that are rotated, the first half of them paired with the second; the
            others stay as they are.
        norms: that still have to be applied before; only where whole heads are rotated.

    Source: RoFormer (Su et al., 2021), in the layout of GPT-NeoX.
    """

    cos: Tensor
    sin: Tensor
    num_dims: int
    norms: HeadNorms | None = None


class Scores(NamedTuple):
    """What a layer makes of the products of queries and keys, and whom a token sees.

    Attributes:
        scaling: factor on the scores.
        window: a token sees itself and this many less one before it; None: all.
        softcap: scores are squashed to ±softcap; None: they are not.
        sinks: (num_heads,) a score of each head that takes part in the softmax and has no value; None: there is none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class PagedKV(NamedTuple):
    """Keys and values of one layer in blocks.

    Attributes:
        keys: (num_blocks, block_size, H_kv, head_dim), each block contiguous; numbers, or codes of FP8.
        values: as the keys.
        key_scales: (num_blocks, H_kv, block_size) float32, each block contiguous, of the codes; None: there are none.
        value_scales: as those of the keys.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
