"""The one place where transformers' layers meet our KV cache.

`paged_attention` is registered as an attention implementation of transformers; each layer calls it with the queries,
keys and values of the whole flat batch. The step's own object (`AttentionStep`) travels as a keyword argument of
`forward`.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from deployments.engine.kernels.arguments import HeadNorms, Rotation, Scores
from deployments.errors import UnsupportedModelError

IMPLEMENTATION = "kvrelay_paged"

# No model takes so many tokens (`model/bounds.py`), and kernels count in 32 bits.
_NO_WINDOW = 2**30
# Given by layers, and without meaning for us: dropout is training's, outputs are the model's own, the rest repeats what
# the step knows.
_IGNORED = frozenset(
    {
        "cache_position",
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)


class Rotary:
    """The rotary embedding that an attention layer leaves to attention, where one kernel does it with the rest.

    Attributes:
        owed: by queries and keys that were not rotated; None: they were.
        norms: that the layer leaves to attention as well.
    """

    __slots__ = ("norms", "owed")

    def __init__(self) -> None:
        self.owed: Rotation | None = None
        self.norms: HeadNorms | None = None

    def take(self) -> Rotation | None:
        """What is owed, once."""
        owed, self.owed = self.owed, None
        return owed


class LayerAttention(NamedTuple):
    """What a layer asks of attention in one step.

    Attributes:
        layer: its index.
        queries: (num_heads, T, head_dim).
        keys: (num_kv_heads, T, head_dim) of the step's tokens.
        values: as the keys.
        scores: what becomes of them.
        rotation: of queries and keys, where it is still to be done.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Scores
    rotation: Rotation | None

    @property
    def nothing(self) -> Tensor:
        """An output in which no token has seen any, for those who stand in for attention: zeros."""
        return self.queries.new_zeros(self.queries.shape[1], self.queries.shape[0], self.values.shape[2])


class AttentionStep(Protocol):
    """Attention for one step: writes the new KV, then attends.

    Attributes:
        rows: (S,) int64 tokens whose logits are wanted, where the last layer is to go on with these alone; None: all.
    """

    @property
    def rows(self) -> Tensor | None: ...

    def attend(self, asked: LayerAttention) -> Tensor:
        """Attend in one layer: (T, num_heads, head_dim)."""
        ...


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention layers call; (1, heads, T, head_dim) in, contiguous (1, T, heads, head_dim) out.

    `s_aux` is transformers' word for attention sinks.

    Raises:
        UnsupportedModelError: the layer asks for something that this attention does not know.
    """
    name = type(module).__name__
    if paged_step is None:
        raise UnsupportedModelError(f"{name} is not given the model's keyword arguments, which paged attention needs")
    if not getattr(module, "is_causal", True) or is_causal is False:
        raise UnsupportedModelError(f"{name} lets tokens see later ones; paged attention is causal")
    unknown = sorted(key for key, given in kwargs.items() if given is not None and key not in _IGNORED)
    if unknown or attention_mask is not None:
        raise UnsupportedModelError(
            f"{name} needs {', '.join(unknown) or 'an attention mask'}, which paged attention lacks"
        )
    if sliding_window is not None and sliding_window >= _NO_WINDOW:
        sliding_window = None
    rotary: Rotary | None = getattr(module, "kvrelay_rotary", None)
    asked = LayerAttention(
        module.layer_idx,  # type: ignore[arg-type]  # nn.Module types its attributes loosely
        query[0],
        key[0],
        value[0],
        Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux),
        None if rotary is None else rotary.take(),
    )
    # As transformers' own: some layers view what they get as one row for each token.
    return paged_step.attend(asked).contiguous().unsqueeze(0), None


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; harmless when repeated."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
