"""Small models with random weights on the GPU, shared by the tests of one process."""

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deployments.engine.config import EngineConfig
from deployments.engine.model.load import LoadedModel, load_model, optimize_layers, prepare_model
from tests.engine.mxfp4_checkpoint import save_in_mxfp4
from tests.tiny_models import ON_A_GPU

SHAPE = ON_A_GPU
VOCAB_SIZE: int = SHAPE["vocab_size"]
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),  # biases of queries, keys and values
    "mistral": MistralConfig(**SHAPE, sliding_window=300),
    "gemma2": Gemma2Config(
        **SHAPE,
        head_dim=256,
        sliding_window=300,
        query_pre_attn_scalar=64,
        attn_logit_softcapping=20.0,
        tie_word_embeddings=False,  # with its scale of the embedding each token would repeat itself
    ),
    "gemma3": Gemma3TextConfig(  # norms of queries and keys, and another base of the rotary embedding beside windows
        **SHAPE,
        head_dim=128,
        sliding_window=300,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
        tie_word_embeddings=False,
    ),
    "phi3": Phi3Config(**SHAPE, rope_parameters=PARTIAL_ROPE, sliding_window=None, pad_token_id=0),
}
# Mixtures of experts: a rounding may send a token elsewhere, so their tokens are compared in another way.
INNER = SHAPE | {"moe_intermediate_size": 256, "num_experts_per_tok": 4, "head_dim": 128}
EXPERTS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**INNER, num_experts=32, norm_topk_prob=True),
    "qwen2_moe": Qwen2MoeConfig(**INNER, num_experts=20, shared_expert_intermediate_size=512),
    "glm4_moe": Glm4MoeConfig(**INNER, n_routed_experts=16, n_group=4, topk_group=2, first_k_dense_replace=1),
    "gpt_oss": GptOssConfig(**SHAPE, head_dim=64, num_local_experts=8, sliding_window=128, pad_token_id=0),
    "gpt_oss_mxfp4": GptOssConfig(**SHAPE, head_dim=64, num_local_experts=8, sliding_window=128, pad_token_id=0),
}

# Those that are loaded from a checkpoint, with experts in MXFP4, and where it is.
_FOLDER = TemporaryDirectory(prefix="mxfp4-")
STORED = {"gpt_oss_mxfp4": Path(_FOLDER.name)}

# Normalises queries and keys that are rotated, so that attention cannot rotate them.
ODD: dict[str, PretrainedConfig] = {"hunyuan": HunYuanDenseV1Config(**SHAPE, head_dim=64)}

# With a context that is long for penalties.
LONG: dict[str, PretrainedConfig] = {"long": LlamaConfig(**SHAPE | {"max_position_embeddings": 1 << 16})}


@cache
def plain(family: str) -> PreTrainedModel:
    """As transformers runs it, in bfloat16."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        (CONFIGS | ODD | LONG | EXPERTS)[family],
        dtype=torch.float32,
        attn_implementation="eager" if family in ("gemma2", "gpt_oss", "gpt_oss_mxfp4") else "sdpa",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06)
            else:  # norms that scale nothing, or biases of zero, would hide what is done in another order
                parameter += 0.2 * torch.randn_like(parameter)
    rotary = copy.deepcopy(model.model.rotary_emb) if family in STORED else None
    moved: PreTrainedModel = model.to("cuda", torch.bfloat16).eval()
    if rotary is not None:
        moved.model.rotary_emb = rotary.to("cuda")  # as it is loaded: its frequencies are not rounded
        save_in_mxfp4(moved, STORED[family])
    return moved


@cache
def exact(family: str) -> PreTrainedModel:
    """The same weights in float32."""
    model: PreTrainedModel = copy.deepcopy(plain(family)).float()
    return model


@cache
def loaded(family: str) -> LoadedModel:
    """The same weights with the engine's layers."""
    model = copy.deepcopy(plain(family))
    if family in STORED:
        return load_model(EngineConfig(model=str(STORED[family])))
    return optimize_layers(prepare_model(model, "random", torch.device("cuda")))
