"""Small models with random weights on the GPU, shared by the tests of one process."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from deployments.engine.model import LoadedModel, optimize_layers, prepare_model

VOCAB_SIZE = 3000
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=True),
}


@cache
def plain(family: str) -> PreTrainedModel:
    """As transformers runs it, in bfloat16."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32, attn_implementation="sdpa")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    moved: PreTrainedModel = model.to("cuda", torch.bfloat16).eval()
    return moved


@cache
def loaded(family: str) -> LoadedModel:
    """The same weights with the engine's layers."""
    model = copy.deepcopy(plain(family))
    found = prepare_model(model, "random", torch.device("cuda"))
    return replace(found, has_cuda_layers=optimize_layers(model))
