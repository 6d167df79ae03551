"""A model whose attention sees keys and values rounded to FP8, in plain torch, one sequence at a time."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.attention.base import LayerAttention
from deployments.engine.kernels.fp8_kv import round_heads, widen_heads


class RoundedStep:
    """Attention of one whole sequence in float32; stands in for an engine's step.

    Args:
        rounds: whether keys and values are rounded.
    """

    rows = None

    def __init__(self, *, rounds: bool = True) -> None:
        self._rounds = rounds

    def attend(self, asked: LayerAttention) -> Tensor:
        keys, values = asked.keys, asked.values
        if self._rounds:
            keys, values = (widen_heads(*round_heads(part), part.dtype) for part in (keys, values))
        group, scores = len(asked.queries) // len(keys), asked.scores
        keys, values = (part.float().repeat_interleave(group, 0) for part in (keys, values))
        logits = asked.queries.float() @ keys.transpose(-1, -2) * scores.scaling
        if scores.softcap is not None:
            logits = scores.softcap * torch.tanh(logits / scores.softcap)
        positions = torch.arange(keys.shape[1], device=keys.device)
        distance = positions[:, None] - positions
        hidden = (distance < 0) | (distance >= (scores.window or len(positions)))
        logits = logits.masked_fill(hidden, float("-inf"))
        if scores.sinks is not None:
            sinks = scores.sinks.float()[:, None, None].expand(-1, len(positions), 1)
            logits = torch.cat((logits, sinks), -1)
        weights = logits.softmax(-1)[..., : len(positions)]
        return (weights @ values).transpose(0, 1).to(asked.queries.dtype)


@torch.inference_mode()
def rounded_logits(model: PreTrainedModel, token_ids: tuple[int, ...], *, rounds: bool = True) -> Tensor:
    """Logits after each token, (T, vocabulary); of a model as `prepare_model` leaves it."""
    ids = torch.tensor([token_ids], device=model.device)
    positions = torch.arange(len(token_ids), device=model.device).unsqueeze(0)
    step = RoundedStep(rounds=rounds)
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, paged_step=step).logits[0]
    return logits.float()
