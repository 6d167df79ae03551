"""What of a model's configuration the engine does not serve: refused by name, before anything is built.

Called when a model is loaded, and before a server starts. How a configuration is read, `config.py` knows.
"""

import re

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from deployments.engine.model.bounds import NUM_EXPERTS, shown
from deployments.engine.model.headers import Headers
from deployments.errors import UnsupportedModelError

_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_HEADS_OF_KV = ("num_key_value_heads", "head_dim")
# For small checkpoints of classes that have a size which they do not use.
_ROOM = 4096
# What other tasks add to a model, as the names of their classes end.
_OTHER_TASK = re.compile(r"For(?!CausalLM$|ConditionalGeneration$)[A-Z]\w*$")


def check_config(config: PretrainedConfig) -> None:
    """Refuse what can be seen from the configuration alone.

    Raises:
        UnsupportedModelError: encoder-decoder, multimodal, layers other than attention, another task, a class that is
            another model's, or heads of several sizes.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only models can be served")
    inputs = [part for part in ("vision_config", "audio_config") if getattr(config, part, None) is not None]
    if inputs:
        raise UnsupportedModelError(f"{name} takes multimodal inputs ({', '.join(inputs)}); only text can be served")
    if other := sorted(_layer_types(config) - _SERVED_LAYERS):
        kinds = ", ".join(other)
        raise UnsupportedModelError(f"{name} has layers of type {kinds}; only attention layers can be served")
    other_tasks = [task for task in _architectures(config) if _OTHER_TASK.search(task)]
    if other_tasks:
        raise UnsupportedModelError(
            f"{', '.join(other_tasks)} (architectures) writes no text; only causal language models are served"
        )
    for named in _architectures(config):
        others = _model_types(named)
        if others and name not in others:
            raise UnsupportedModelError(
                f"config.json: architectures names {named}, which is of model_type {' or '.join(sorted(others))}, and"
                f" model_type is {name!r}"
            )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{name} is not a causal language model known to transformers")
    _check_heads(config)


def check_counts(path: str, config: PretrainedConfig, headers: Headers) -> None:
    """Refuse what a checkpoint cannot have before it is built: that many layers, experts or numbers of a head.

    Raises:
        UnsupportedModelError: names the field, and what the checkpoint has.
    """
    if not headers:  # of a form that does not tell
        return
    largest, shape = headers.largest
    longest, has = max(shape, default=1), f"checkpoint's largest weight is {largest}, {list(shape)}"
    bounds = [(name, longest, has) for name in NUM_EXPERTS]  # a gate has a row for each
    bounds += [(name, max(longest, _ROOM), has) for name in ("hidden_size", "head_dim")]
    if (held := headers.num_layers) is not None:
        bounds.append(("num_hidden_layers", held, f"checkpoint has the weights of {held} layer{'s' * (held > 1)}"))
    for name, bound, has in bounds:
        own_name = config.attribute_map.get(name, name)
        value = getattr(config, own_name, None)
        if isinstance(value, int) and value > bound:
            raise UnsupportedModelError(f"model {path!r}: config.json: {own_name} is {value}, but the {has}")


def _check_heads(config: PretrainedConfig) -> None:
    """Refuse layers whose KV differs in shape, where each has a configuration of its own (Gemma 4)."""
    layers = list(config.per_layer_config) if config.is_heterogeneous else []
    for name in _HEADS_OF_KV:
        found = dict.fromkeys(shown(value) for layer in layers if (value := getattr(layer, name, None)) is not None)
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{config.model_type}: {name} is {' or '.join(found)}, depending on the layer;"
                " keys and values must have one shape in all layers"
            )


def _layer_types(config: PretrainedConfig) -> set[str]:
    return set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def _architectures(config: PretrainedConfig) -> list[str]:
    named = config.architectures
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _model_types(architecture: str) -> set[str]:
    """Which models transformers calls so; none: a name of somebody else's."""
    return {
        model_type
        for classes in (MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        for model_type, names in classes.items()
        if architecture in ((names,) if isinstance(names, str) else names)
    }
