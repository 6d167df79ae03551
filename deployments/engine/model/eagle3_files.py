"""Reads EAGLE-3 heads: which files make one, whether it fits a model, its weights, and whether these compute anything.

A checkpoint has `config.json`, of Llama's kind, and `model.safetensors` or `pytorch_model.bin` with `fc`, `midlayer`
(in some `layers.0`), `norm` and `lm_head`; with `d2t` where it does not know every token of the model, and
`embed_tokens` where it does not use the model's. Called when a model is loaded, and before a server starts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deployments.engine.attention.base import LayerAttention
from deployments.engine.model.bounds import shown
from deployments.engine.model.config import blamed, build_config, read_config, read_values
from deployments.engine.model.eagle3 import NORMS_RESIDUAL, NUM_STATES, Eagle3Form, Eagle3Head
from deployments.engine.model.headers import Header, Headers, read_headers, weight_files
from deployments.engine.model.weights import check_finite
from deployments.errors import UnsupportedModelError

_IDS = "eagle_aux_hidden_state_layer_ids"
# Of draft tokens the difference to the model's ids, and of the model's tokens whether they are known.
_TO_TARGET, _IS_KNOWN = "d2t", "t2d"


def check_eagle3(path: str, target: PretrainedConfig) -> Eagle3Form:
    """Refuse a head that cannot guess for a model, by its configuration, the shapes of its weights, and its tokens.

    Args:
        path: folder or hub id of the head.
        target: configuration of the model.

    Returns:
        What it is.

    Raises:
        UnsupportedModelError: names what is at fault, in one line.
    """
    config, headers = read_config(path), _read_headers(path)
    _check_fields(path, config)
    if not isinstance(config, LlamaConfig) or config.num_hidden_layers != 1:
        raise _refusal(
            path, f"model_type is {config.model_type} with {config.num_hidden_layers} layers, must be llama with 1"
        )
    for name, wanted in (("vocab_size", target.vocab_size), ("target_hidden_size", target.hidden_size)):
        if (value := getattr(config, name, None)) not in (None, wanted):
            raise _refusal(path, f"{name} is {value}, the model's is {wanted}")
    form = Eagle3Form(
        config,
        _layers(path, config, target.num_hidden_layers),
        target.hidden_size,
        getattr(config, "draft_vocab_size", None) or config.vocab_size,
        "embed_tokens.weight" in headers,
        "fc.bias" in headers,
    )
    if not form.has_embedding and config.hidden_size != target.hidden_size:
        sizes = f"hidden_size is {config.hidden_size}, the model's is {target.hidden_size}"
        raise _refusal(path, f"{sizes}, and it has no embed_tokens of its own")
    if headers:
        _check_shapes(path, form, headers)
        if (to_target := _read_weight(path, _TO_TARGET)) is not None:
            _target_ids(path, to_target, config.vocab_size)
    return form


def load_eagle3(path: str, target: nn.Module, config: PretrainedConfig) -> Eagle3Head:
    """Load a head for a model, in the model's dtype and on its device.

    Args:
        path: folder or hub id of the head.
        target: the model.
        config: of the model.

    Raises:
        UnsupportedModelError: see `check_eagle3`; or it computes what is not finite.
    """
    form, weights = check_eagle3(path, config), _read_weights(path)
    found = {name: Header.of(weight) for name, weight in weights.items()}
    _check_shapes(path, form, found)
    to_target, _ = weights.pop(_TO_TARGET, None), weights.pop(_IS_KNOWN, None)
    target_ids = None if to_target is None else _target_ids(path, to_target, config.vocab_size)
    with torch.device("meta"):
        head = Eagle3Head(form)
    embedding: Any = target.get_input_embeddings()  # type: ignore[operator]  # of transformers' models
    like = embedding.weight
    head.load_state_dict({name: weight.to(like.device, like.dtype) for name, weight in weights.items()}, assign=True)
    check_finite(path, head)
    head.complete(embedding, target_ids)
    _check_guesses(path, head)
    return head


class _OneToken:
    """Attention of a sequence that has one token."""

    rows = None

    def attend(self, asked: LayerAttention) -> Tensor:
        keys, values = (
            part.repeat_interleave(len(asked.queries) // len(part), 0) for part in (asked.keys, asked.values)
        )
        scores = (asked.queries * keys).sum(-1, keepdim=True) * asked.scores.scaling
        return (scores.softmax(-1) * values).transpose(0, 1)  # not finite if the score is not


@torch.inference_mode()
def _check_guesses(path: str, head: Eagle3Head) -> None:
    """Have it guess once: from what is not finite attention on a CPU makes an error, which would end the engine."""
    weight = head.fc.weight
    states = torch.linspace(-1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype).unsqueeze(0)
    first = torch.zeros(1, dtype=torch.int64, device=weight.device)
    known = head.known_logits(head(head.fuse(states), first, first, _OneToken()))
    if not bool(known.isfinite().all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise _refusal(path, f"computes what is not finite from its first token on, in {dtype}")


def _target_ids(path: str, to_target: Tensor, vocab_size: int) -> Tensor:
    target_ids = to_target.long() + torch.arange(len(to_target))
    ids = target_ids.unique()
    if len(ids) != len(target_ids) or not 0 <= int(ids[0]) <= int(ids[-1]) < vocab_size:
        raise _refusal(path, f"{_TO_TARGET} names tokens twice, or such as the model does not have")
    return target_ids


def _refusal(path: str, fault: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"EAGLE-3 head {path!r}: {fault}")


def _check_fields(path: str, config: PretrainedConfig) -> None:
    """Of those that transformers does not know, or does not try."""
    beside = getattr(config, "eagle_config", None)
    if not isinstance(beside, Mapping | None):
        raise _refusal(path, f"eagle_config is {shown(beside)}, must be an object")
    _check_ids(path, _IDS, getattr(config, _IDS, None))
    _check_ids(path, f"eagle_config.{_IDS}", (beside or {}).get(_IDS))
    size = getattr(config, "draft_vocab_size", None)
    if size is not None and (type(size) is not int or size < 1):
        raise _refusal(path, f"draft_vocab_size is {shown(size)}, must be a whole number of at least 1")
    if not isinstance(norms := getattr(config, NORMS_RESIDUAL, None), bool | None):
        raise _refusal(path, f"{NORMS_RESIDUAL} is {shown(norms)}, must be true or false")
    try:
        _build_rotary(config.to_dict())
    except Exception as error:
        raise blamed(path, read_values(path), _build_rotary, error) from error


def _check_ids(path: str, name: str, ids: object) -> None:
    if not isinstance(ids, list | tuple | None) or not all(type(one) is int for one in ids or ()):
        raise _refusal(path, f"{name} is {shown(ids)}, must be a list of {NUM_STATES} numbers of layers")


def _build_rotary(values: Mapping[str, Any]) -> None:
    config = build_config(values)
    if isinstance(config, LlamaConfig):
        LlamaRotaryEmbedding(config)


def _layers(path: str, config: LlamaConfig, num_layers: int) -> tuple[int, ...]:
    """Layers of the model whose inputs are wanted.

    SGLang's `eagle_config` names those whose outputs are, vLLM's field beside it those whose inputs are; else it is
    those that EAGLE-3 was published with.
    """
    of_outputs = (getattr(config, "eagle_config", None) or {}).get(_IDS)
    if of_outputs:
        layers = tuple(layer + 1 for layer in of_outputs)
    else:
        layers = tuple(getattr(config, _IDS, None) or (2, num_layers // 2, num_layers - 3))
    if len(layers) != NUM_STATES or len(set(layers)) != NUM_STATES or not all(0 <= n < num_layers for n in layers):
        raise _refusal(
            path, f"it takes the inputs of layers {list(layers)}, must be {NUM_STATES} of the model's {num_layers}"
        )
    return tuple(sorted(layers))


def _check_shapes(path: str, form: Eagle3Form, headers: Mapping[str, Header]) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(weight.shape) for name, weight in Eagle3Head(form).state_dict().items()}
    size, vocab_size = form.draft_vocab_size, form.config.vocab_size
    if _TO_TARGET in headers or size != vocab_size:
        wanted[_TO_TARGET] = (size,)
    if _IS_KNOWN in headers:
        wanted[_IS_KNOWN] = (vocab_size,)
    for name, shape in wanted.items():
        if name not in headers:
            raise _refusal(path, f"the checkpoint lacks {name}, {list(shape)}")
        if headers[name].shape != shape:
            raise _refusal(path, f"{name} is {list(headers[name].shape)}, must be {list(shape)}")
    if unknown := sorted(headers.keys() - wanted.keys()):
        raise _refusal(path, f"it has {unknown[0]}, which heads of this form do not have")


def _own_name(name: str) -> str:
    """As `Eagle3Head` calls it."""
    return name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)


def _read_headers(path: str) -> Headers:
    return Headers({_own_name(name): header for name, header in read_headers(path).items()})


def _read_weight(path: str, wanted: str) -> Tensor | None:
    """None: there is none of this name; or the file is of a form of which the whole would be read."""
    for file in weight_files(path):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  # no mapping
                if _own_name(name) == wanted:
                    weight: Tensor = content.get_tensor(name)
                    return weight
    return None


def _read_weights(path: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in weight_files(path):
        weights |= load_file(file)
    if not weights:
        for file in weight_files(path, "pytorch_model.bin"):
            weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {_own_name(name): weight for name, weight in weights.items()}
