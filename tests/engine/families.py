"""Small random models of many families, made in memory, and what transformers itself generates with them.

The weights are drawn so that greedy outputs wander through the vocabulary: a model that repeats one token would agree
with anything.
"""

import copy
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deployments.engine.model.load import LoadedModel, optimize_layers, prepare_model

CPU = torch.device("cpu")
VOCAB_SIZE = 512
WINDOW = 24

SIZES: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_WITHOUT_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
_EXPERTS: dict[str, object] = {"num_experts_per_tok": 2}

_CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", SIZES),
    "qwen2": ("Qwen2Config", _WITHOUT_HEAD_DIM),
    "qwen2_windowed_layers": (
        "Qwen2Config",
        _WITHOUT_HEAD_DIM | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SIZES),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": None}),
    "mistral_windowed": ("MistralConfig", SIZES | {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", _WITHOUT_HEAD_DIM | {"sliding_window": None}),
    "olmo2": ("Olmo2Config", _WITHOUT_HEAD_DIM),
    "granite": ("GraniteConfig", _WITHOUT_HEAD_DIM),
    "smollm3": ("SmolLM3Config", _WITHOUT_HEAD_DIM | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "gemma2": (
        "Gemma2Config",
        # Caps low enough that they matter for the scores of random weights.
        SIZES
        | {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",  # rotates by another base where it has no window
        SIZES
        | {"num_hidden_layers": 3, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt_oss": (
        "GptOssConfig",
        SIZES | _EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW, "pad_token_id": 0},
    ),
    "glm4": ("Glm4Config", SIZES),
    "hunyuan": ("HunYuanDenseV1Config", SIZES),  # normalises queries and keys that are rotated
    "mixtral": ("MixtralConfig", SIZES | _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SIZES | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",  # a shared expert behind a gate of its own
        _WITHOUT_HEAD_DIM
        | _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",  # chooses by sigmoids within groups; its first layer has no experts
        SIZES
        | _EXPERTS
        | {
            "n_routed_experts": 4,
            "moe_intermediate_size": 48,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
FAMILIES = tuple(_CONFIGS)


def build_config(family: str) -> PretrainedConfig:
    name, sizes = _CONFIGS[family]
    config: PretrainedConfig = getattr(transformers, name)(**copy.deepcopy(sizes))
    return config


@cache
def build_model(family: str) -> PreTrainedModel:
    """A model with transformers' own attention; shared, so copy it before changing it."""
    # Softcaps and sinks are dropped by torch's fused attention: the reference must be the explicit one.
    attention = "eager" if family in ("gemma2", "gpt_oss") else "sdpa"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(build_config(family), attn_implementation=attention)
    return randomize(model)


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw the weights anew, large enough that every layer and position changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.add_(0.2 * noise)
            else:
                weight.copy_(noise if "embed" in name else 1.5 * noise * weight.shape[-1] ** -0.5)
    model.eval()
    return model


@cache
def load(family: str, *, optimized: bool = False) -> LoadedModel:
    """The model as an engine takes it; engines may share it."""
    loaded = prepare_model(copy.deepcopy(build_model(family)), "", CPU)
    if optimized:
        optimize_layers(loaded.model)
    return loaded


@cache
def reference(family: str, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """What transformers' `generate` continues the prompt with."""
    return continue_greedily(build_model(family), prompt, max_tokens)


def continue_greedily(model: Any, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """Transformers' `generate`, for any of its models."""
    output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens)
    return tuple(output[0, len(prompt) :].tolist())


def random_prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCAB_SIZE, (num_tokens,), generator=generator).tolist())
