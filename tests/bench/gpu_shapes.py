"""The models that `bench_gpu` measures, and the rows: for two environments, so transformers alone is imported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import (
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

# Of every engine that is measured.
MAX_NUM_SEQS, MAX_TOKENS = 256, 16384
# Before the tokens whose time is measured.
PROMPT_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """A model that is measured, with random weights; an entry of `SHAPES` is all it takes.

    Attributes:
        config: builds the configuration.
        batch_sizes: whose time per token is measured.
        prompts: (how many, their tokens), whose time is measured.
        quantization: of its weights, as `engine.quantization`.
    """

    config: Callable[[], PretrainedConfig]
    batch_sizes: tuple[int, ...] = (1, 8, 32, 128, 256)
    prompts: tuple[tuple[int, int], ...] = ((1, 512), (1, 2048), (1, 8192), (16, 1024))
    quantization: Literal["fp8", "mxfp4"] | None = None


def llama_8b() -> PretrainedConfig:
    """Llama-3.1-8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def qwen3_600m() -> PretrainedConfig:
    """Qwen3-0.6B."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )


def mistral_7b_window() -> PretrainedConfig:
    """Mistral-7B-v0.1: every layer sees 4,096 tokens."""
    return MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        tie_word_embeddings=False,
    )


def gemma_2_9b() -> PretrainedConfig:
    """Gemma-2-9B: every other layer sees 4,096 tokens; softcaps."""
    return Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
        max_position_embeddings=8192,
        sliding_window=4096,
    )


def qwen3_30b_a3b() -> PretrainedConfig:
    """Qwen3-30B-A3B: 128 experts, of which each token takes 8; 61 GB."""
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,  # type: ignore[call-arg]  # known to the model alone
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )


def gpt_oss_20b() -> PretrainedConfig:
    """gpt-oss-20b in bfloat16: sinks, every other layer sees 128 tokens, 32 experts with biases; 42 GB."""
    return GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131072,
    )


def gpt_oss_120b() -> PretrainedConfig:
    """gpt-oss-120b: 36 layers of 128 experts; 63 GB in MXFP4."""
    config = gpt_oss_20b()
    config.update({"num_hidden_layers": 36, "num_local_experts": 128})
    return GptOssConfig.from_dict({**config.to_dict(), "layer_types": None})


SHAPES = {
    "llama-8b": Shape(llama_8b),
    "llama-8b-fp8": Shape(llama_8b, quantization="fp8"),
    "qwen3-0.6b": Shape(qwen3_600m),
    "mistral-7b-window": Shape(mistral_7b_window),
    "gemma-2-9b": Shape(gemma_2_9b, prompts=((1, 512), (1, 2048), (1, 8000), (16, 1024))),
    "qwen3-30b-a3b": Shape(qwen3_30b_a3b),
    "gpt-oss-20b": Shape(gpt_oss_20b),
    "gpt-oss-20b-mxfp4": Shape(gpt_oss_20b, quantization="mxfp4"),
    "gpt-oss-120b-mxfp4": Shape(gpt_oss_120b, quantization="mxfp4"),
}


def longest(shape: Shape) -> int:
    """Tokens of the longest sequence that an engine is built for."""
    return min(12288, int(shape.config().max_position_embeddings))


def lengths() -> np.ndarray:
    """Prompt and output tokens of the 256 requests whose throughput is measured, uniform: (256, 2)."""
    return np.random.default_rng(1).integers(100, 1025, (256, 2))
