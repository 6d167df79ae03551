"""The sizes of all small models with random weights, and their configurations; for tests, and benchmarks' dry runs."""

import copy
from typing import Any

import transformers
from transformers import PretrainedConfig

# What most tests run: two layers, four heads in two groups.
SMALL: dict[str, Any] = {
    "vocab_size": 512,
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
# In changes to `SMALL`: one layer, so that a step takes about a millisecond.
ONE_LAYER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# In changes to `SMALL`: experts of another size than the attention around them.
ONE_LAYER_OF_EXPERTS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_experts_per_tok": 2,
}
# In changes to `SMALL`: as little as a GGUF file needs.
FOR_A_FILE: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
# Whole, as the next ones: what Triton's interpreter runs in seconds.
INTERPRETED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Heads of 64, as kernels of a GPU take them.
ON_A_GPU: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
# The same on a CPU.
NARROW = ON_A_GPU | {"hidden_size": 64, "intermediate_size": 128}
# There to be loaded; modelled engines only seem to run it.
MODELLED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}
# For dry runs of benchmarks of GPUs: as long a context as theirs.
DRY_RUN: dict[str, Any] = {
    "vocab_size": 50_000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}

# Classes that know no size of a head but that of their share of the hidden size.
_WITHOUT_HEAD_DIM = frozenset(
    ("GraniteConfig", "Olmo2Config", "Phi3Config", "PhimoeConfig", "Qwen2Config", "Qwen2MoeConfig", "SmolLM3Config")
)


def small_config(name: str, **changes: object) -> PretrainedConfig:
    """A configuration of transformers' class of that name: `SMALL`, but for the changes."""
    sizes = SMALL
    if name in _WITHOUT_HEAD_DIM:
        sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    config: PretrainedConfig = getattr(transformers, name)(**copy.deepcopy(sizes | changes))
    return config
