"""Runs two tokens through a model to learn the KV of a token, and to refuse what its configuration did not give away.

A flat batch of unrelated sequences is only right if tokens meet in attention and nowhere else, and if positions are
what we say they are. Both are tried out here, once per start, for the price of three short forward passes.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention.base import LayerAttention
from deployments.engine.kv.cache import KVShape
from deployments.engine.layers.looked_into import watching_linears
from deployments.engine.layers.trial import is_near
from deployments.engine.model.rope import max_model_len
from deployments.errors import UnsupportedModelError, brief
from deployments.kv_groups import KVGroup, KVGroups

logger = logging.getLogger(__name__)

# Of groups of layers: the share of their blocks that may be empty, and how many there may be.
_MAX_UNUSED, _MAX_GROUPS = 0.2, 8
# With less a whole prompt may lie behind the window, and a hand-off would have no block to bring.
_MIN_WINDOW = 2
# What transformers' code raises where a configuration makes no sense.
_FAULTS_OF_MODELS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError)


class _Probe:
    """Stands in for attention: notes what each layer hands over, and lets no token see another."""

    rows = None

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.layers: dict[int, tuple[int, int, int]] = {}
        self.windows: dict[int, int | None] = {}
        self.dtype = torch.float32

    def attend(self, asked: LayerAttention) -> Tensor:
        layer, keys = asked.layer, asked.keys
        self.calls.append(layer)
        self.layers[layer] = (keys.shape[0], keys.shape[2], asked.values.shape[2])
        self.windows[layer] = asked.scores.window
        self.dtype = keys.dtype
        return asked.nothing


@torch.inference_mode()
def judge_layers(model: PreTrainedModel) -> None:
    """Refuse what can be told of a model without numbers, on torch's meta device, of all that `probe_kv_shape` refuses.

    Where its code looks at numbers nothing can be told. Turns the model into bfloat16, which experts' products want.

    Raises:
        UnsupportedModelError: a layer does not use our attention, or has a window that it does not serve.
    """
    _check_positions(model)
    probe = _Probe()
    try:
        model.bfloat16()
        _run(model, [0, 1], torch.arange(2, device=model.device).unsqueeze(0), probe)
        _kv_shape(model, probe)
        _check_windows(model, probe)
    except _FAULTS_OF_MODELS as error:
        if isinstance(error, UnsupportedModelError):
            raise
        logger.info("%s does not run without numbers: %s", model.config.model_type, brief(error))


@torch.inference_mode()
def probe_kv_shape(model: PreTrainedModel, device: torch.device) -> KVShape:
    """Learn what one token's KV is; and note of the model's layers which have to stay as they are.

    Raises:
        UnsupportedModelError: a layer does not use our attention, or uses it in a way that a flat batch breaks.
    """
    _check_positions(model)
    name, probe = model.config.model_type, _Probe()
    pad = getattr(model.config, "pad_token_id", None)  # some models count positions without padding tokens
    first, second = [token for token in range(3) if token != pad][:2]
    positions = torch.arange(2, device=device).unsqueeze(0)
    # Logits that should be equal may differ by rounding where experts see other groups of tokens; what is looked for
    # moves them by much more.
    with watching_linears(model):
        logits = _last_logits(model, [first, second], positions, probe)
    shape = _kv_shape(model, probe)
    if not bool(logits.isfinite().all()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise UnsupportedModelError(f"{name} computes what is not finite from its first tokens on, in {dtype}")
    _check_windows(model, probe)
    if not is_near(_last_logits(model, [first, second], None, _Probe()), logits):
        raise UnsupportedModelError(f"{name} does not count positions from 0, as the engine does")
    if not is_near(_last_logits(model, [second, second], positions, _Probe()), logits):
        raise UnsupportedModelError(f"{name} mixes neighbouring tokens outside of its attention layers")
    return shape


def _check_positions(model: PreTrainedModel) -> None:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        name = model.config.model_type
        raise UnsupportedModelError(f"{name} takes no position_ids; sequences in one batch cannot have their own")


def _run(model: PreTrainedModel, token_ids: list[int], positions: Tensor | None, probe: _Probe) -> Tensor:
    """Logits of the last token."""
    output = model(
        input_ids=torch.tensor([token_ids], device=model.device),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=1,
        paged_step=probe,
        return_dict=True,
    )
    logits: Tensor = output.logits[0, -1].float()
    return logits


def _last_logits(model: PreTrainedModel, token_ids: list[int], positions: Tensor | None, probe: _Probe) -> Tensor:
    try:
        return _run(model, token_ids, positions, probe)
    except _FAULTS_OF_MODELS as error:
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        raise UnsupportedModelError(f"{model.config.model_type} does not run: {brief(error)}") from error


def _kv_shape(model: PreTrainedModel, probe: _Probe) -> KVShape:
    name, num_layers = model.config.model_type, model.config.num_hidden_layers
    missing = [i for i in range(num_layers) if i not in probe.layers]
    if missing:
        raise UnsupportedModelError(f"{name}: layers {missing} do not use attention but {_mixers(model, missing)}")
    if sorted(probe.calls) != list(range(num_layers)):
        raise UnsupportedModelError(f"{name} has {num_layers} layers, but attention ran in layers {probe.calls}")
    try:
        return KVShape(_grouped(_alike(probe.layers), _windows(model, probe)), probe.dtype)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None


def _windows(model: PreTrainedModel, probe: _Probe) -> dict[int, int | None]:
    """Of each layer, how many of the newest tokens it sees; None: all, or as many as the model takes."""
    longest = max_model_len(model.config)
    return {layer: window if window and 0 < window < longest else None for layer, window in probe.windows.items()}


def _alike(layers: Mapping[int, tuple[int, int, int]]) -> tuple[KVGroup, ...]:
    """Put layers whose KV has one shape together."""
    layers_of: dict[tuple[int, int], list[int]] = {}
    for i, (num_kv_heads, key_dim, value_dim) in sorted(layers.items()):
        if key_dim != value_dim:
            raise UnsupportedModelError(
                f"heads of keys and values must have one size, those of layer {i} have {key_dim} and {value_dim}"
            )
        layers_of.setdefault((num_kv_heads, key_dim), []).append(i)
    return tuple(KVGroup(tuple(layers), *heads) for heads, layers in layers_of.items())


def _grouped(alike: tuple[KVGroup, ...], windows: Mapping[int, int | None]) -> KVGroups:
    """Put layers with a window and others into groups of their own, of as many layers each.

    They stay together where that would leave much of the pool unused, or take many tables.
    """
    (group, *others), widest = alike, max((window or 0 for window in windows.values()), default=0)
    full, windowed = ([i for i in group.layers if (windows[i] is None) is is_full] for is_full in (True, False))
    if others or not widest:
        return alike
    if not full:
        return (replace(group, window=widest),)
    size = min(len(full), len(windowed))
    groups = [replace(group, layers=layers) for layers in _cut(full, size)]
    groups += [replace(group, layers=layers, window=widest) for layers in _cut(windowed, size)]
    num_places = size * len(groups)
    is_tight = num_places - len(group.layers) <= _MAX_UNUSED * num_places and len(groups) <= _MAX_GROUPS
    return tuple(groups) if is_tight else alike


def _cut(layers: list[int], size: int) -> list[tuple[int, ...]]:
    """Put layers into as few groups of at most so many as can be.

    Those at one place of all groups are as near each other as can be: a hand-off in parts of layers is cut by places.
    """
    num_groups = -(-len(layers) // size)
    num_longer = len(layers) - (num_groups - 1) * size
    longer, others = layers[: num_longer * num_groups], layers[num_longer * num_groups :]
    groups = [[*longer[i::num_groups], *others[i :: num_groups - 1]] for i in range(num_groups - 1)]
    return [tuple(group) for group in (*groups, longer[num_groups - 1 :: num_groups])]


def _check_windows(model: PreTrainedModel, probe: _Probe) -> None:
    """Some layers are told of their window by a mask alone, and masks are what paged attention does without."""
    config = model.config
    if narrow := [i for i, window in probe.windows.items() if window is not None and window < _MIN_WINDOW]:
        raise UnsupportedModelError(
            f"{config.model_type}: layers {narrow} have a sliding window of {probe.windows[narrow[0]]} tokens, must be"
            f" at least {_MIN_WINDOW}"
        )
    window = getattr(config, "sliding_window", None)
    is_its_own = any(field.name == "sliding_window" for field in fields(config))  # else a leftover that nobody reads
    if window is None or window >= max_model_len(config) or not is_its_own:
        return
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    blind = [i for i, kind in enumerate(layer_types) if kind == "sliding_attention" and probe.windows[i] is None]
    if blind:
        raise UnsupportedModelError(
            f"{config.model_type}: layers {blind} have a sliding window of {window} tokens, but do not pass it on to"
            " paged attention"
        )


def _mixers(model: nn.Module, layers: list[int]) -> str:
    """Class names of whatever mixes tokens in these layers."""
    names = {type(module).__name__ for module in model.modules() if getattr(module, "layer_idx", None) in layers}
    return ", ".join(sorted(names)) or "another kind of layer"
