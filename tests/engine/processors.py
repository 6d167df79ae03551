"""What transformers' `generate` draws once its logits processors have changed the logits."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from deployments.messages import Adjustments
from tests.engine.families import build_model


class OpenAIPenalties(LogitsProcessor):
    """The formula of OpenAI's reference; transformers has no such processor."""

    def __init__(self, num_prompt_tokens: int, presence: float, frequency: float) -> None:
        self.num_prompt_tokens, self.presence, self.frequency = num_prompt_tokens, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = input_ids[0, self.num_prompt_tokens :]
        counts = torch.bincount(generated, minlength=scores.shape[1]).float()
        return scores - counts * self.frequency - (counts > 0) * self.presence


def processors(wanted: Adjustments, num_prompt_tokens: int, stops: tuple[int, ...] = ()) -> LogitsProcessorList:
    """Those that do what is wanted; `stops`: what `min_tokens` bars."""
    found = LogitsProcessorList()
    if wanted.logit_bias:
        found.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in wanted.logit_bias]))
    if wanted.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
    found.append(OpenAIPenalties(num_prompt_tokens, wanted.presence_penalty, wanted.frequency_penalty))
    if wanted.min_tokens:
        found.append(MinNewTokensLengthLogitsProcessor(num_prompt_tokens, wanted.min_tokens, list(stops)))
    return found


@cache
def continue_adjusted(
    prompt: tuple[int, ...], wanted: Adjustments, num_tokens: int, stops: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """What the llama of `families.py` continues a prompt with, greedily; nothing ends it early."""
    model: Any = build_model("llama")
    found = processors(wanted, len(prompt), stops)
    output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, logits_processor=found)
    return tuple(output[0, len(prompt) :].tolist())
