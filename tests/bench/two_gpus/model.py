"""A model folder with random weights, tokenizer included, that the whole service can load.

Every token is a word, so that any id the model draws is text, and the text tells the id.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from tests.bench.gpu_shapes import SHAPES
from tests.bench.random_models import fill_random
from tests.tiny_models import DRY_RUN


def config_of(shape: str) -> PretrainedConfig:
    """One of `gpu_shapes`, or `tiny`, with which the benchmark itself can be tried on a CPU."""
    if shape != "tiny":
        return SHAPES[shape].config()
    return LlamaConfig(**DRY_RUN)


def write_model(folder: Path, shape: str) -> None:
    """Save a model of this shape, unless one is there."""
    if (folder / "config.json").exists():
        return
    config = config_of(shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    fill_random(model)
    model.generation_config.eos_token_id = None
    _write_tokenizer(folder, config.vocab_size)
    model.save_pretrained(folder, max_shard_size="4GB")


def gpu_names() -> list[str]:
    """Of this machine, for reports."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
