"""EAGLE-3 heads: one decoder layer that guesses tokens from what a model's own layers made of the ones before.

A head takes the hidden states of a low, a middle and a high layer, brings them together by one product (`fuse`), and
puts the next token's embedding beside them. Its layer is of Llama's kind, but for queries, keys and values, which are
computed from both. Its output stands in for the states of the token that it guesses, so that it goes on from there. It
knows the more frequent tokens of the vocabulary alone, by numbers of their own.

Knows tensors and no files (`eagle3_files.py`). Run by the drafter of the same name.

Source: EAGLE-3 (Li et al., 2025), in the form of the checkpoints that SGLang and vLLM load.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from deployments.engine.attention.base import AttentionStep, LayerAttention
from deployments.engine.kernels.arguments import Rotation, Scores
from deployments.engine.kv.cache import KVShape
from deployments.kv_groups import KVGroup

NUM_STATES = 3
# A field of configurations: the layer adds to its normalised states, and not to these as they are.
NORMS_RESIDUAL = "norm_before_residual"


@dataclass(frozen=True, slots=True)
class Eagle3Form:
    """Of what size a head is.

    Attributes:
        config: of its layer; of Llama's kind.
        layers: of the model, whose inputs it takes.
        state_size: of one of these.
        draft_vocab_size: tokens that it knows.
        has_embedding: it brings one of its own; else it shares the model's.
        has_bias: of `fc`.
    """

    config: LlamaConfig
    layers: tuple[int, ...]
    state_size: int
    draft_vocab_size: int
    has_embedding: bool
    has_bias: bool


def _kv_heads(config: LlamaConfig) -> tuple[int, int]:
    """How many, and of what size; Llama's configurations fill in both."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return config.num_key_value_heads, config.head_dim


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, num_heads, has_bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        num_kv_heads, head_dim = _kv_heads(config)
        self.q_proj = nn.Linear(2 * size, num_heads * head_dim, bias=has_bias)
        self.k_proj = nn.Linear(2 * size, num_kv_heads * head_dim, bias=has_bias)
        self.v_proj = nn.Linear(2 * size, num_kv_heads * head_dim, bias=has_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, size, bias=has_bias)
        self._head_dim = head_dim
        self.leaves_rotary = False

    def ask(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> LayerAttention:
        """What it asks of attention, of (T, 2 * hidden_size)."""
        queries, keys, values = (
            projection(x).view(len(x), -1, self._head_dim).transpose(0, 1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = Scores(self._head_dim**-0.5)
        if self.leaves_rotary:
            return LayerAttention(0, queries, keys, values, scores, Rotation(*rotary, self._head_dim))
        rotated = apply_rotary_pos_emb(queries.unsqueeze(0), keys.unsqueeze(0), *rotary)
        return LayerAttention(0, rotated[0][0], rotated[1][0], values, scores, None)

    def forward(self, asked: LayerAttention, step: AttentionStep) -> Tensor:
        """(T, hidden_size)."""
        attended: Tensor = self.o_proj(step.attend(asked).flatten(1))
        return attended


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_norm = LlamaRMSNorm(size, eps)
        self.input_layernorm = LlamaRMSNorm(size, eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(size, eps)
        self.mlp = LlamaMLP(config)
        self._norms_residual = getattr(config, NORMS_RESIDUAL, None) is True

    def ask(self, states: Tensor, embedded: Tensor, rotary: tuple[Tensor, Tensor]) -> LayerAttention:
        both = torch.cat((self.input_layernorm(embedded), self.hidden_norm(states)), dim=-1)
        return self.self_attn.ask(both, rotary)

    def forward(self, states: Tensor, asked: LayerAttention, step: AttentionStep) -> Tensor:
        residual = self.hidden_norm(states) if self._norms_residual else states
        states = residual + self.self_attn(asked, step)
        out: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out


class Eagle3Head(nn.Module):
    """See the module. The names of its parts are those of checkpoints.

    Args:
        form: of what size it is.
    """

    target_ids: Tensor

    def __init__(self, form: Eagle3Form) -> None:
        super().__init__()
        config, self.layers = form.config, form.layers
        self.vocab_size: int = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if form.has_embedding else None
        self.fc = nn.Linear(NUM_STATES * form.state_size, config.hidden_size, bias=form.has_bias)
        self.midlayer = _Layer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, form.draft_vocab_size, bias=False)
        # Which token of the model each token is that it knows.
        self.register_buffer("target_ids", torch.arange(form.draft_vocab_size), persistent=False)
        self._group = KVGroup((0,), *_kv_heads(config))
        self._config = config
        self.rotary: LlamaRotaryEmbedding | None = None
        self._table: tuple[Tensor, Tensor] | None = None

    def complete(self, embedding: nn.Module, target_ids: Tensor | None) -> None:
        """Give it what its checkpoint leaves to the model, where it does, and what depends on the device.

        Args:
            embedding: of the model.
            target_ids: (draft_vocab_size,) int64, of the tokens that it knows; None: it knows them all.
        """
        weight = self.fc.weight
        self.embed_tokens = self.embed_tokens or embedding  # type: ignore[assignment]  # a model's may be a class of its own
        self.rotary = LlamaRotaryEmbedding(self._config).to(weight.device)
        ids = torch.arange(self.lm_head.out_features) if target_ids is None else target_ids
        self.target_ids = ids.to(weight.device)
        self.eval().requires_grad_(False)

    def leave_rotary(self) -> None:
        """From now on attention rotates queries and keys; it is one of a GPU's kernels."""
        self.midlayer.self_attn.leaves_rotary = True

    @property
    def leaves_rotary(self) -> bool:
        return self.midlayer.self_attn.leaves_rotary

    def tabulate(self, max_tokens: int) -> tuple[Tensor, Tensor]:
        """Look rotary embeddings up from now on, of so many positions, in place of computing them in each step.

        Returns:
            What is looked up, which graphs that are recorded from now on read.
        """
        assert self.rotary is not None, "it is not complete"
        weight, width = self.norm.weight, _kv_heads(self._config)[1]
        tables = self.rotary(weight, torch.arange(max_tokens, device=weight.device).unsqueeze(0))
        cos, sin = (table[0, :, : width // 2 if self.leaves_rotary else width].contiguous() for table in tables)
        self._table = cos, sin
        return cos, sin

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @property
    def kv_shape(self) -> KVShape:
        return KVShape((self._group,), self.fc.weight.dtype)

    def fuse(self, states: Tensor) -> Tensor:
        """(T, hidden_size) of what its layers of the model were given, (T, 3 * state_size)."""
        fused: Tensor = self.fc(states)
        return fused

    def ask(self, states: Tensor, token_ids: Tensor, positions: Tensor) -> LayerAttention:
        """What its layer asks of attention: all that the KV of tokens takes. Arguments as of `forward`."""
        assert self.embed_tokens is not None, "it is not complete"
        return self.midlayer.ask(states, self.embed_tokens(token_ids), self._rotary_of(states, positions))

    def forward(self, states: Tensor, token_ids: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Go on by one layer.

        Args:
            states: (T, hidden_size) of tokens: fused, or what this gave for them.
            token_ids: (T,) the tokens behind these.
            positions: (T,) of the former.
            step: attention over its own KV.

        Returns:
            (T, hidden_size) what stands in for the states of the latter.
        """
        out: Tensor = self.midlayer(states, self.ask(states, token_ids, positions), step)
        return out

    def known_logits(self, states: Tensor) -> Tensor:
        """(S, draft_vocab_size) of the tokens that it knows, behind those whose states `forward` gave."""
        known: Tensor = self.lm_head(self.norm(states))
        return known

    def spread(self, known: Tensor) -> Tensor:
        """(S, vocab_size) of `known_logits`; minus infinity of unknown tokens."""
        if known.shape[1] == self.vocab_size:
            return known[:, self.target_ids.argsort()]
        return known.new_full((len(known), self.vocab_size), -torch.inf).index_copy_(1, self.target_ids, known)

    def logits(self, states: Tensor) -> Tensor:
        """(S, vocab_size) of the tokens behind those whose states `forward` gave; minus infinity of unknown ones."""
        return self.spread(self.known_logits(states))

    def _rotary_of(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, head_dim) each; half as many columns where attention rotates."""
        if self._table is not None:
            cos, sin = (table.index_select(0, positions).unsqueeze(0) for table in self._table)
            return cos, sin
        assert self.rotary is not None, "it is not complete"
        computed: tuple[Tensor, Tensor] = self.rotary(states, positions.unsqueeze(0))
        return computed
