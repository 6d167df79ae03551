"""What attention's kernels are told of a layer: how it rotates, and what it makes of the scores."""

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
