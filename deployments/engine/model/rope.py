"""Rotary embeddings that depend on the length of a sequence, made fit for a flat batch of many sequences.

transformers takes the longest sequence of a batch for the length of all, so that one request would change another's
tokens. Here each token is rotated as in a batch of its own; its position says what its length is
(`scheduling/positions.py`).
Also knows for how many tokens an embedding was made. Called while a model is loaded.
"""

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deployments.engine.model.bounds import MAX_MODEL_LEN
from deployments.engine.scheduling.positions import FIXED, PositionRule, ScaledPositions, SwitchedPositions
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Their frequencies stretch with a factor, so that they go beyond what `max_position_embeddings` says, if it says less.
_STRETCHED = frozenset({"yarn", "longrope"})
_LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})


def max_model_len(config: PretrainedConfig) -> int:
    """Tokens of the longest sequence that a model was made for, its rotary embedding stretched as far as it says.

    Raises:
        UnsupportedModelError: its configuration does not say.
    """
    if (longest := getattr(config, "max_position_embeddings", None)) is None:
        raise UnsupportedModelError(f"{config.model_type} does not say how long a text may be: max_position_embeddings")
    for rope in _rope_parameters(config):
        if (stretched := _stretched_len(rope, config.max_position_embeddings)) > MAX_MODEL_LEN:
            raise UnsupportedModelError(
                f"{config.model_type}: its rotary embedding, stretched by factor {rope['factor']}, is for {stretched}"
                f" tokens, must be at most {MAX_MODEL_LEN}"
            )
        longest = max(longest, stretched)
    return int(longest)


def separate_lengths(model: PreTrainedModel) -> tuple[PositionRule, int]:
    """Replace rotary embeddings that depend on the length, in place.

    Returns:
        What is added to positions from now on, and the longest sequence that the model can run, in tokens.

    Raises:
        UnsupportedModelError: its parameters say nothing that makes sense.
    """
    longest = max_model_len(model.config)
    _check_factors(model)
    kinds = {rope["rope_type"] for rope in _rope_parameters(model.config)} & _LENGTH_DEPENDENT
    if not kinds:
        return FIXED, longest
    border = min(_border(rope, model.config) for rope in _rope_parameters(model.config))
    if border >= longest:
        return FIXED, longest
    stride = 1 << longest.bit_length()
    assert not any(isinstance(module, SwitchedRotary | ScaledRotary) for module in model.modules()), "done before"
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(kind := getattr(child, "rope_type", None), str) and kind in kinds
    ]
    if len(kinds) > 1 or not found:  # another one per kind of layer: no model is known to have that
        logger.warning("its rotary embedding depends on the length in a way not known here: serving %d tokens", border)
        return FIXED, border
    is_dynamic = kinds == {"dynamic"}
    for parent, name, child in found:
        setattr(parent, name, (ScaledRotary if is_dynamic else SwitchedRotary)(child, border, stride))
    rule = ScaledPositions(border, stride) if is_dynamic else SwitchedPositions(border, stride)
    return rule, longest


def _check_factors(model: PreTrainedModel) -> None:
    """A list of one factor would be taken for all frequencies."""
    frequencies = (getattr(module, "inv_freq", None) for module in model.modules())
    sizes = {len(each) for each in frequencies if isinstance(each, Tensor)}
    for rope in _rope_parameters(model.config):
        for name in ("short_factor", "long_factor"):
            factors = rope.get(name)
            if isinstance(factors, list) and sizes and len(factors) not in sizes:
                count, wanted = len(factors), " or ".join(map(str, sorted(sizes)))
                raise UnsupportedModelError(
                    f"{model.config.model_type}: {name} of its rotary embedding has {count} factors, must have {wanted}"
                )


def waits_for_device(model: PreTrainedModel) -> bool:
    """Whether its rotary embedding, once separated, waits for the device in each step."""
    return any(isinstance(module, ScaledRotary) for module in model.modules())


class SwitchedRotary(nn.Module):
    """LongRoPE, token by token.

    Args:
        rotary: of transformers; takes the last position plus one for the length.
        border: tokens of the longest sequence that it rotates by its short factors.
        stride: see `SwitchedPositions`.
    """

    def __init__(self, rotary: nn.Module, border: int, stride: int) -> None:
        super().__init__()
        self._rotary, self._border, self._stride = rotary, border, stride

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = position_ids % self._stride
        is_long = (position_ids >= self._stride).unsqueeze(-1)
        short = self._rotary(x, positions.clamp(max=self._border - 1))
        long = _rotate_as_of(self._rotary, x, positions, self._border + 1)
        return torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])


class ScaledRotary(nn.Module):
    """Dynamic NTK, token by token; waits for the device.

    Args:
        rotary: of transformers; takes the last position plus one for the length.
        border: tokens of the longest sequence that is not scaled.
        stride: see `ScaledPositions`.
    """

    def __init__(self, rotary: nn.Module, border: int, stride: int) -> None:
        super().__init__()
        self._within, self._beyond = rotary, copy.deepcopy(rotary)
        self._border, self._stride = border, stride

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = position_ids % self._stride
        lengths = torch.maximum(position_ids // self._stride, positions + 1)
        cos, sin = self._within(x, positions.clamp(max=self._border - 1))
        for length in lengths[lengths > self._border].unique().tolist():
            rows = (lengths[0] == length).nonzero()[:, 0]
            # It only ever adapts to greater lengths than it has seen.
            self._beyond.max_seq_len_cached = self._border  # type: ignore[assignment]  # nn.Module's loose attributes
            cos[:, rows], sin[:, rows] = _rotate_as_of(self._beyond, x, positions[:, rows], length)
        return cos, sin


def _rotate_as_of(rotary: nn.Module, x: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cos and sin, (1, T, D) each, as in a sequence of so many tokens: it is shown the last of them too."""
    last = positions.new_full((1, 1), length - 1)
    cos, sin = rotary(x, torch.cat([positions, last], dim=1))
    return cos[:, :-1], sin[:, :-1]


def _rope_parameters(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """Of every kind of layer; most models have one for all."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return [rope for rope in nested or [parameters] if rope.get("rope_type")]


def _stretched_len(rope: Mapping[str, Any], longest: int) -> int:
    factor = rope.get("factor")
    if factor is None or not math.isfinite(factor):
        return longest
    if rope["rope_type"] == "dynamic":
        return int(longest * factor)
    if rope["rope_type"] in _STRETCHED:
        return int((rope.get("original_max_position_embeddings") or longest) * factor)
    return longest


def _border(rope: Mapping[str, Any], config: PretrainedConfig) -> int:
    """Tokens up to which the length makes no difference."""
    if rope["rope_type"] == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings)
