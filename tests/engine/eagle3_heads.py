"""EAGLE-3 heads with random weights in the form of public checkpoints, and what one guesses without any engine."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from deployments.engine.attention.base import LayerAttention
from deployments.engine.model.eagle3 import Eagle3Form, Eagle3Head
from tests.engine.families import small_model
from tests.tiny_models import SMALL

NUM_LAYERS = 8  # of which a head takes the inputs of 2, 4 and 5
DRAFT_VOCAB_SIZE = 96
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": SMALL["vocab_size"],
    "draft_vocab_size": DRAFT_VOCAB_SIZE,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


@cache
def target() -> PreTrainedModel:
    """The model; shared, so copy it before changing it."""
    return small_model("LlamaConfig", num_hidden_layers=NUM_LAYERS)


def weights() -> dict[str, Tensor]:
    """Of a head: as those of LLaMA-3.1 have them, it brings no embedding."""
    generator, size, vocab_size = torch.Generator().manual_seed(7), CONFIG["hidden_size"], CONFIG["vocab_size"]
    layer = {
        "self_attn.q_proj": (64, 2 * size),
        "self_attn.k_proj": (32, 2 * size),
        "self_attn.v_proj": (32, 2 * size),
        "self_attn.o_proj": (size, 64),
        "mlp.gate_proj": (96, size),
        "mlp.up_proj": (96, size),
        "mlp.down_proj": (size, 96),
    }
    norms = {f"midlayer.{name}": (size,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    shapes: dict[str, tuple[int, ...]] = {f"midlayer.{name}": shape for name, shape in layer.items()}
    shapes |= norms | {"norm": (size,), "fc": (size, 3 * size), "lm_head": (DRAFT_VOCAB_SIZE, size)}
    found = {
        f"{name}.weight": torch.randn(shape, generator=generator) * (1.5 * shape[-1] ** -0.5)
        if len(shape) > 1
        else 1 + 0.2 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    known = torch.randperm(vocab_size, generator=generator)[:DRAFT_VOCAB_SIZE].sort().values
    return found | {
        "d2t": known - torch.arange(DRAFT_VOCAB_SIZE),
        "t2d": torch.isin(torch.arange(vocab_size), known),
    }


def save(folder: Path, tensors: dict[str, Tensor], *, is_old: bool = False, **changes: object) -> str:
    """A checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if is_old:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return str(folder)


def head_of(model: PreTrainedModel) -> Eagle3Head:
    """One for a model of any size, which takes the input of its first layer three times."""
    config = LlamaConfig.from_dict(copy.deepcopy(CONFIG) | {"vocab_size": model.config.vocab_size})
    head = Eagle3Head(Eagle3Form(config, (0, 0, 0), model.config.hidden_size, config.vocab_size, True, False))
    head.complete(model.get_input_embeddings(), None)
    return head


class Dense:
    """Attention of one sequence that has no tokens before."""

    rows = None

    def attend(self, asked: LayerAttention) -> Tensor:
        groups = len(asked.queries) // len(asked.keys)
        keys, values = (part.repeat_interleave(groups, 0) for part in (asked.keys, asked.values))
        out = torch.nn.functional.scaled_dot_product_attention(asked.queries, keys, values, is_causal=True)
        return out.transpose(0, 1)


@torch.inference_mode()
def guesses(
    head: Eagle3Head, tokens: list[int], count: int, first: int = 0, model: PreTrainedModel | None = None
) -> tuple[int, ...]:
    """What a head guesses behind a sequence, greedily, if it has the states of its tokens from the first one on."""
    hidden = (model or target())(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    states = head.fuse(torch.cat([hidden[layer][0] for layer in head.layers], dim=1))[first:]
    told = list(tokens[first + 1 :])
    for _ in range(count):
        out = head(states, torch.tensor(told), torch.arange(len(told)), Dense())
        told.append(int(head.logits(out[-1:]).argmax()))
        states = torch.cat((states, out[-1:]))
    return tuple(told[len(told) - count :])
