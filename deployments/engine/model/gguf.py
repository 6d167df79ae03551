"""Converts a GGUF file, once, to a folder as transformers writes them: weights in float32, tokenizer beside them.

transformers reads the weights. What it passes over, and a model answers wrongly without, is added here from the file's
metadata: scaling of the rotary embedding, windows, sizes of heads, ends of turns. A tensor that finds no place is an
error. Called by `resolve.py`, once per file.

Source of keys and tensor names: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's conversion scripts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from deployments.engine.model.bounds import shown
from deployments.engine.model.files import scratch_beside
from deployments.engine.model.gguf_reader import BoundedReader
from deployments.engine.model.headers import Header, Headers
from deployments.engine.model.weights import check_complete
from deployments.errors import UnsupportedModelError, brief

_ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
# By these llama.cpp knows the end of a turn where the metadata has none.
_TURN_ENDS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>"})
_CONTROL = 3  # type of a token
# Metadata that transformers reads for some architectures only, and the field it belongs to where the class has it.
_FIELDS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# Each is a side of some tensor, or a part of one.
_SIZES = (
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "expert_count",
)
# A class's own default would be in their place, which may be another model's.
_REQUIRED = ("block_count", "context_length", "embedding_length", "attention.head_count")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_GEMMA_27B_LAYERS = (46, 62)
_BIASES = {"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_up.bias": "mlp_bias"}


def write_dense(shards: list[Path], folder: Path) -> None:
    """Write what `shards` hold into a folder that `from_pretrained` reads.

    Raises:
        UnsupportedModelError: they hold no model that is known here; says why.
    """
    try:
        if len(shards) == 1:
            _write_dense(shards[0], shards[0], folder)
            return
        with scratch_beside(folder) as scratch:
            whole = scratch / shards[0].name
            _join(shards, whole)
            _write_dense(whole, shards[0], folder)
    except (UnsupportedModelError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # metadata of types that nobody expects end in whatever they happen to mean
        raise UnsupportedModelError(
            f"model {str(shards[0])!r}: its metadata makes no model ({brief(error)})"
        ) from error


def _write_dense(file: Path, named: Path, folder: Path) -> None:
    source = _Source(file, named)
    with source.read_once():
        config, model, tokenizer = _load(source, file)
    source.check_used(model)
    # transformers dequantizes on loading but goes on calling the model quantized, and then will not save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id, eos_token_id=source.end_tokens() or None
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(source: "_Source", file: Path) -> tuple[PretrainedConfig, Any, Any]:
    """The configuration, the model and the tokenizer, as transformers has them of the file."""
    config = source.config()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise source.refusal(brief(error)) from error
    model, found = loaded
    check_complete(str(source.named), model, found, headers={})
    return config, model, tokenizer


class _Source:
    """A GGUF file's metadata and tensors.

    Args:
        file: to read.
        named: as the user knows it.
    """

    def __init__(self, file: Path, named: Path) -> None:
        self._file, self.named = file, named
        try:
            self._reader = BoundedReader(file)
            self._architecture = str(self._value("general.architecture"))
        except Exception as error:  # a truncated file ends in whatever its bytes happen to mean
            raise self.refusal(f"not readable, perhaps truncated ({brief(error)})") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Have transformers take the file as it was read here.

        It reads it for the configuration, for the weights and for the tokenizer, each time token by token: 2 to 4 s.
        """
        whole: Any = gguf.GGUFReader

        def reader(file: str | Path) -> GGUFReader:
            return self._reader if Path(file).samefile(self._file) else whole(file)

        setattr(gguf, "GGUFReader", reader)  # noqa: B010  # it is a class to mypy
        try:
            yield
        finally:
            setattr(gguf, "GGUFReader", whole)  # noqa: B010

    def refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model {str(self.named)!r}: {reason}")

    def _check_sizes(self) -> None:
        """Refuse sizes that no tensor has before anything is built by them."""
        headers = Headers({name: Header(tuple(map(int, each.shape)), "F32") for name, each in self._tensors.items()})
        if not headers:
            raise self.refusal("it has no tensors")
        missing = [key for key in _REQUIRED if self._of_architecture(key) is None]
        if missing or all(self._of_architecture(key) is None for key in _EPSILONS):
            raise self.refusal(f"it lacks {self._architecture}.{(missing or _EPSILONS)[0]}")
        longest, layers = max(max(header.shape, default=1) for header in headers.values()), headers.num_layers
        for key in ("block_count", *_SIZES):
            bound, value = layers if key == "block_count" else longest, self._of_architecture(key)
            if not isinstance(value, int | list | None):
                raise self.refusal(f"{self._architecture}.{key} is {shown(value)}: must be a whole number")
            if bound is not None and isinstance(value, int) and not 0 < value <= bound:
                raise self.refusal(f"{self._architecture}.{key} is {value}: must be from 1 to {bound}, by its tensors")

    def config(self) -> PretrainedConfig:
        """What transformers reads, and what it passes over."""
        self._check_sizes()
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self._file.parent, gguf_file=self._file.name)
        except Exception as error:
            raise self.refusal(brief(error)) from error
        if config.model_type == "mistral":
            config.sliding_window = None  # the class has one where nothing is said
        for key, field in _FIELDS.items():
            if (value := self._of_architecture(key)) is not None and hasattr(config, field):
                setattr(config, field, value)
        for name, field in _BIASES.items():
            if name in self._tensors and hasattr(config, field):
                setattr(config, field, True)
        if (embedding := self._tensors.get("token_embd.weight")) is not None:
            config.vocab_size = int(embedding.shape[-1])
        if (pad := config.pad_token_id) is not None and pad >= config.vocab_size:
            config.pad_token_id = None  # the class's own, of another vocabulary
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = _gemma_scale(config)
        rope = getattr(config, "rope_parameters", None) or {}
        every_layer = "full_attention" not in rope  # else those with a window have their own, never scaled
        scaled = rope if every_layer else rope["full_attention"]
        if scaled.get("rope_type", "default") == "default":
            scaled = scaled | self._rope(config)
            config.rope_parameters = scaled if every_layer else rope | {"full_attention": scaled}
        return config

    def end_tokens(self) -> list[int]:
        """Ids that end a text or a turn."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        ids = {int(value) for key in keys if (value := self._value(f"tokenizer.ggml.{key}")) is not None}
        tokens = self._value("tokenizer.ggml.tokens") or []
        types = self._value("tokenizer.ggml.token_type") or [_CONTROL] * len(tokens)
        ids |= {i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if _ends_turn(token, kind)}
        return sorted(ids)

    def check_used(self, model: Any) -> None:
        """Refuse the file if the model has no place for one of its tensors, or turns other parts of a head.

        Raises:
            UnsupportedModelError: names them.
        """
        make: Any = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)
        processor = make(config=model.config.to_dict())
        # Its parts by themselves only if need be: that takes seconds.
        whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
        lost = self._lost(get_gguf_hf_weights_map(whole, processor))
        if lost:
            lost = self._lost(get_gguf_hf_weights_map(model, processor))
        if lost and lost != ["output.weight"]:  # which some architectures are given by hand
            raise self.refusal(f"tensors that transformers does not read: {', '.join(lost[:5])} ({len(lost)} in all)")
        self._check_rotated(model)

    def _check_rotated(self, model: Any) -> None:
        turned = {2 * len(module.inv_freq) for module in model.modules() if hasattr(module, "inv_freq")}
        wanted = self._of_architecture("rope.dimension_count")
        if wanted is not None and turned and turned != {wanted}:
            raise self.refusal(f"{wanted} dimensions of each head are to be rotated, transformers rotates {turned}")

    def _lost(self, placed: dict[str, str]) -> list[str]:
        """Tensors of the file that are not among those that have a place."""
        # Experts are parameters themselves, and named without "weight".
        return sorted(self._tensors.keys() - _ROPE_TENSORS - placed.keys() - {f"{name}.weight" for name in placed})

    def _rope(self, config: PretrainedConfig) -> dict[str, Any]:
        """Parameters of a rotary embedding that is scaled, or turns a part of each head."""
        longest = config.max_position_embeddings
        rope: dict[str, Any] = {}
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if (turned := self._of_architecture("rope.dimension_count")) not in (None, head_dim):
            rope["partial_rotary_factor"] = turned / head_dim
        original = self._of_architecture("rope.scaling.original_context_length")
        if "rope_freqs.weight" in self._tensors:  # of Llama 3.1: a factor for each frequency, at every length
            factors = self._factors("rope_freqs.weight")
            rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
            return rope | {"original_max_position_embeddings": longest}
        if "rope_factors_long.weight" in self._tensors:  # of Phi-3
            rope |= {"rope_type": "longrope", "long_factor": self._factors("rope_factors_long.weight")}
            rope |= {"short_factor": self._factors("rope_factors_short.weight")}
            if (attention := self._of_architecture("rope.scaling.attn_factor")) is not None:
                rope["attention_factor"] = attention
            config.original_max_position_embeddings = original or longest
            return rope | {"original_max_position_embeddings": original or longest}
        kind, factor = self._of_architecture("rope.scaling.type"), self._of_architecture("rope.scaling.factor")
        if kind is None and (factor := factor or self._of_architecture("rope.scale_linear")) is not None:
            kind = "linear"
        if kind in (None, "none") or factor in (None, 0.0, 1.0):
            return rope
        if kind == "linear":
            return rope | {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            raise self.refusal(f"its rotary embedding is scaled by {kind!r}, which is not known here")
        for name in ("beta_fast", "beta_slow"):
            if (beta := self._of_architecture(f"rope.scaling.yarn_{name}")) is not None:
                rope[name] = beta
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or longest}

    def _factors(self, name: str) -> list[float]:
        return [float(factor) for factor in self._tensors[name].data]

    def _of_architecture(self, key: str) -> Any:
        return self._value(f"{self._architecture}.{key}")

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()


def _gemma_scale(config: PretrainedConfig) -> int:
    """Of the scores; no key has it, and llama.cpp knows the one size of Gemma 2 and of Gemma 3 that has another."""
    if config.num_hidden_layers in _GEMMA_27B_LAYERS:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _ends_turn(token: str, kind: int) -> bool:
    return kind == _CONTROL and token in _TURN_ENDS


def _read(shard: Path) -> GGUFReader:
    try:
        return BoundedReader(shard)
    except Exception as error:
        raise UnsupportedModelError(
            f"model {str(shard)!r}: not readable, perhaps truncated ({brief(error)})"
        ) from error


def _join(shards: list[Path], whole: Path) -> None:
    """Write the file that was split; the first shard has all of the metadata."""
    readers = [_read(shard) for shard in shards]
    first = readers[0]
    architecture = first.get_field("general.architecture")
    if architecture is None:
        raise UnsupportedModelError(f"model {str(shards[0])!r}: the first of the split files has no metadata")
    writer = GGUFWriter(whole, architecture.contents(), endianess=first.endianess)
    for field in first.fields.values():
        if field.name != "general.architecture" and not field.name.startswith(("GGUF.", "split.")):
            kind, *element = field.types[:2]
            writer.add_key_value(field.name, field.contents(), kind, sub_type=element[0] if element else None)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    expected = first.get_field("split.tensors.count")
    if expected is not None and expected.contents() != len(tensors):
        raise UnsupportedModelError(
            f"model {str(shards[0])!r}: {len(tensors)} tensors in {len(shards)} files, of {expected.contents()}"
        )
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
