"""Writes small models as GGUF files, the way llama.cpp's conversion does, and their sources rounded alike."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

F32, F16, BF16, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))
EOS, EOT, IM_END = 300, 301, 302
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "mlp.gate": "ffn_gate_inp",
}
# A norm comes after attention, not before the MLP, where there are four of them.
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def rounded(model: PreTrainedModel, kind: GGMLQuantizationType) -> PreTrainedModel:
    """A copy of the model whose matrices have been through `kind`."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind).reshape(weight.shape)))
    return copied


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    kind: GGMLQuantizationType = F32,
    *,
    architecture: str = "llama",
    leave_out: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, Any] | None = None,
    max_tensors: int = 0,
) -> list[Path]:
    """Write a model.

    Args:
        file: to write; with `max_tensors` its name is that of the whole.
        model: of a family whose layers have Llama's or Phi-3's names.
        kind: of the matrices; vectors stay in float32.
        architecture: as llama.cpp calls it.
        leave_out: tensors by their names in the file.
        extra: further tensors.
        metadata: further keys; those that begin with a dot are of the architecture.
        max_tensors: of one file.

    Returns:
        The files.
    """
    before = set(file.parent.iterdir())
    writer = GGUFWriter(file, architecture, split_max_tensors=max_tensors)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    _add_tokenizer(writer, config.vocab_size)
    add: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (metadata or {}).items():
        name = f"{architecture}{key}" if key.startswith(".") else key
        add[type(value)](name, value)
    tensors = _tensors(model, architecture, head_dim)
    for name, weight in (tensors | (extra or {})).items():
        if name not in leave_out:
            quantized = kind if weight.ndim > 1 else F32
            writer.add_tensor(name, quantize(weight, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(set(file.parent.iterdir()) - before)


def _add_tokenizer(writer: GGUFWriter, vocab_size: int) -> None:
    """All bytes, one merge, and what a chat needs."""
    tokens = [*bytes_to_unicode().values(), "th"]
    tokens += [f"<unused{number}>" for number in range(len(tokens), vocab_size)]
    tokens[EOS], tokens[EOT], tokens[IM_END] = "<|endoftext|>", "<|turn|>", "<|im_end|>"
    kinds = [TokenType.NORMAL] * vocab_size
    kinds[EOS] = kinds[EOT] = kinds[IM_END] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(EOS)


def _tensors(model: PreTrainedModel, architecture: str, head_dim: int) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    names = _NAMES | (_FOUR_NORMS if architecture == "gemma2" else {})
    for parameter, value in model.named_parameters():
        weight = value.detach().numpy()
        stem, _, suffix = parameter.rpartition(".")
        if ".experts" in stem:  # fused, and parameters themselves
            block = f"blk.{stem.split('.')[2]}"
            parts = zip(("gate", "up"), np.split(weight, 2, axis=1), strict=True)
            experts = [("down", weight)] if suffix == "down_proj" else parts
            tensors |= {f"{block}.ffn_{part}_exps.weight": np.ascontiguousarray(array) for part, array in experts}
            continue
        block, part = "", stem
        if stem.startswith("model.layers."):
            _, _, number, part = stem.split(".", 3)
            block = f"blk.{number}."
        if architecture == "llama" and part.endswith(("q_proj", "k_proj")):
            weight = _permuted(weight, head_dim)
        if architecture == "gemma2" and "norm" in part:
            weight = weight + 1
        tensors[f"{block}{names[part]}.{suffix}"] = weight
    return tensors


def _permuted(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp rotates neighbours where transformers rotates halves."""
    heads = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)
