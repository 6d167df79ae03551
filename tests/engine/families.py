"""Small random models of many families, made in memory, and what transformers itself generates with them.

The weights are drawn so that greedy outputs wander through the vocabulary: a model that repeats one token would agree
with anything.
"""

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deployments.engine.model.load import LoadedModel, optimize_layers, prepare_model
from tests.engine.length_dependent import LENGTH_DEPENDENT
from tests.tiny_models import SMALL, small_config

CPU = torch.device("cpu")
VOCAB_SIZE: int = SMALL["vocab_size"]
WINDOW = 24

# Softcaps and sinks are dropped by torch's fused attention: the reference must be the explicit one.
_EXPLICIT = frozenset(("Gemma2Config", "GptOssConfig"))
_EXPERTS: dict[str, object] = {"num_experts_per_tok": 2}

# A class of configurations, and what differs from `SMALL`.
_CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_windowed_layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_windowed": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "gemma2": (
        "Gemma2Config",
        # Caps low enough that they matter for the scores of random weights.
        {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",  # rotates by another base where it has no window
        {"num_hidden_layers": 3, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3_loose": (
        "Gemma3TextConfig",  # two layers without a window, and three with one: a place of four is empty
        {"num_hidden_layers": 5, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
        | {"layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full", "sliding", "sliding")]},
    ),
    "gpt_oss": ("GptOssConfig", _EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "glm4": ("Glm4Config", {}),
    "hunyuan": ("HunYuanDenseV1Config", {}),  # normalises queries and keys that are rotated
    "mixtral": ("MixtralConfig", _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}),
    "qwen2_moe": (
        "Qwen2MoeConfig",  # a shared expert behind a gate of its own
        _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",  # chooses by sigmoids within groups; its first layer has no experts
        _EXPERTS
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


def small_model(name: str, attention: str | None = None, **changes: object) -> PreTrainedModel:
    """A model with random weights of such a configuration, the same whenever it is made."""
    if attention is None:
        attention = "eager" if name in _EXPLICIT else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # GPT-OSS draws its sinks, of which `randomize` changes a little
        model = AutoModelForCausalLM.from_config(small_config(name, **changes), attn_implementation=attention)
    return randomize(model)


def build_config(family: str) -> PretrainedConfig:
    name, changes = _CONFIGS[family]
    return small_config(name, **changes)


@cache
def build_model(family: str) -> PreTrainedModel:
    """A model with transformers' own attention; shared, so copy it before changing it."""
    name, changes = (_CONFIGS | LENGTH_DEPENDENT)[family]
    return small_model(name, **changes)  # type: ignore[arg-type]  # no change is called `attention`


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
    return optimize_layers(loaded) if optimized else loaded


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
