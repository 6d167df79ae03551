"""Attention in plain torch and float32, against which kernels are held."""

import torch
from torch import Tensor

from deployments.engine.kernels.arguments import Scores


def expected_attention(queries: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    """Plain torch in float32: of queries (Q, H, head_dim), the last of so many keys (K, H_kv, head_dim)."""
    num_queries, num_heads, num_keys = len(queries), queries.shape[1], len(keys)
    key, value = (part.float().repeat_interleave(num_heads // keys.shape[1], 1) for part in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", queries.float(), key) * scores.scaling
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    positions = torch.arange(num_keys, device=queries.device)
    distance = positions[num_keys - num_queries :, None] - positions
    hidden = (distance < 0) | (distance >= (scores.window or num_keys))
    logits = logits.masked_fill(hidden, float("-inf"))
    if scores.sinks is not None:
        sinks = scores.sinks.float()[:, None, None].expand(-1, num_queries, 1)
        weights = torch.cat((logits, sinks), -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
