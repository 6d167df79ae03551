"""The models that `bench_gpu` measures, and vLLM's figures of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import (
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VLLM_VERSION = "0.33"


@dataclass(frozen=True)
class Shape:
    """A model that is measured, with random weights, and vLLM's figures of it; an entry of `SHAPES` is all it takes.

    Attributes:
        config: builds the configuration.
        tpot_ms: of each batch size; None: vLLM was not measured.
        prefill_ms: of (prompts, their tokens).
        throughput: output tokens per second.
        quantization: of its weights, as `engine.quantization`.
    """

    config: Callable[[], PretrainedConfig]
    tpot_ms: dict[int, float | None]
    prefill_ms: dict[tuple[int, int], float | None]
    throughput: float | None
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


# vLLM's figures are of one H100 80GB, 2026-11-27, dummy weights, greedy; compare those of one visit (docs/measured.md).
SHAPES = {
    "llama-8b": Shape(
        llama_8b,
        {1: 6.66, 8: 6.54, 32: 7.72, 128: 9.49, 256: 13.78},
        {(1, 512): 16.2, (1, 2048): 51.7, (1, 8192): 221.0, (16, 1024): 389.0},
        8305.0,
    ),
    "llama-8b-fp8": Shape(
        llama_8b,
        {1: 4.27, 8: 4.39, 32: 5.08, 128: 8.11, 256: 12.88},
        {(1, 512): 17.7, (1, 2048): 36.1, (1, 8192): 148.0, (16, 1024): 272.0},
        10083.0,
        quantization="fp8",
    ),
    "qwen3-0.6b": Shape(
        qwen3_600m,
        {1: 1.72, 8: 1.90, 32: 2.64, 128: 5.63, 256: 9.12},
        {(1, 512): 11.8, (1, 2048): 20.3, (1, 8192): 34.9, (16, 1024): 47.7},
        18332.0,
    ),
    "mistral-7b-window": Shape(
        mistral_7b_window,
        {1: 6.22, 8: 6.46, 32: 7.00, 128: 9.43, 256: 13.43},
        {(1, 512): 17.1, (1, 2048): 50.5, (1, 8192): 212.0, (16, 1024): 371.0},
        8423.0,
    ),
    "gemma-2-9b": Shape(
        gemma_2_9b,
        {1: 8.58, 8: 8.91, 32: 10.11, 128: 15.23, 256: 23.03},
        {(1, 512): None, (1, 2048): None, (1, 8000): None, (16, 1024): None},
        None,
    ),
    "qwen3-30b-a3b": Shape(
        qwen3_30b_a3b,
        {1: 4.80, 8: 10.46, 32: 20.72, 128: 26.41},
        {(1, 512): None, (1, 2048): None, (1, 8192): None, (16, 1024): None},
        None,
    ),
    "gpt-oss-20b": Shape(
        gpt_oss_20b,
        {1: None, 8: None, 32: None, 128: None},
        {(1, 512): None, (1, 2048): None, (1, 8192): None, (16, 1024): None},
        None,
    ),
    # Its weights as they are stored, as vLLM keeps them.
    "gpt-oss-20b-mxfp4": Shape(
        gpt_oss_20b,
        {1: None, 8: None, 32: None, 128: None},
        {(1, 512): None, (1, 2048): None, (1, 8192): None, (16, 1024): None},
        None,
        quantization="mxfp4",
    ),
    "gpt-oss-120b-mxfp4": Shape(
        gpt_oss_120b,
        {1: None, 8: None, 32: None, 128: None},
        {(1, 512): None, (1, 2048): None, (1, 8192): None, (16, 1024): None},
        None,
        quantization="mxfp4",
    ),
}
