"""A model with random weights that counts, for benchmarks of guesses: what it says is known, no rounding changes it."""

import random

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deployments.engine.model.load import LoadedModel, optimize_layers, prepare_model
from tests.bench.random_models import fill_random
from tests.engine_pair import random_prompt

# The text that an answer edits, and of how many tokens one differs; at regular places a drafter could tell where.
TEXT_TOKENS, EDIT_EVERY = 300, 12
_BETWEEN = 16  # tokens between the text and the answer
_FIRST = 1000  # no token of the text ends an answer


def load_counting(config: PretrainedConfig, device: str) -> LoadedModel:
    """The token behind n is n + 1, by far, whatever stands before."""
    config.tie_word_embeddings = False
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill_random(model)
    embedding, output = (model.get_parameter(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    with torch.no_grad():
        output.copy_(embedding.roll(1, 0))
        embedding.mul_(1500)  # what layers add to it is small beside it
    return optimize_layers(prepare_model(model, "random", torch.device(device)))


def edited_prompt(num_tokens: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    """A prompt with a text in it that the answer of a model that counts repeats, but for one token of each few.

    Raises:
        ValueError: it has no room for the text.
    """
    num_random = num_tokens - TEXT_TOKENS - _BETWEEN - 2
    if num_random < 0:
        raise ValueError(f"a prompt of {num_tokens} tokens has no room for a text of {TEXT_TOKENS}")
    rng = random.Random(seed)
    first = rng.randrange(_FIRST, vocab_size - 2 * TEXT_TOKENS)
    text = list(range(first, first + TEXT_TOKENS))
    for place in rng.sample(range(2, TEXT_TOKENS), TEXT_TOKENS // EDIT_EVERY):
        text[place] = rng.randrange(_FIRST, vocab_size)
    before, between = random_prompt(num_random, seed + 1, vocab_size), random_prompt(_BETWEEN, seed + 2, vocab_size)
    return (*before, *text, *between, first, first + 1)
