"""Beside graphs and pipelining, changed logits and logprobs are those of transformers' own model on the same GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.messages import Adjustments, DrawnToken, SamplingParams, TokenOutput
from tests.engine.driving import greedy, run
from tests.engine.processors import processors
from tests.gpu.driving import NUM_TOKENS, TIE, build, prompt
from tests.gpu.models import plain

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

LENGTHS = (1, 40, 257, 700)
ADJUSTMENTS = {
    "repetition": Adjustments(repetition_penalty=1.4),
    # Of random weights no token comes twice by itself.
    "generated": Adjustments(presence_penalty=-1.5, frequency_penalty=-0.7),
    "bias": Adjustments(logit_bias=((3, 4.0), (7, -100.0))),
    "all": Adjustments(((3, 4.0), (7, -6.0)), 1.2, 0.9, -0.3),
}


@torch.inference_mode()
def logits_before(given: tuple[int, ...], tokens: list[int]) -> Tensor:
    """(tokens, vocab_size) float32, of each of these tokens."""
    ids = torch.tensor([[*given, *tokens]], device="cuda")
    logits: Tensor = plain("llama")(ids, use_cache=False).logits[0, len(given) - 1 : -1].float()
    return logits


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_each_token_is_the_likeliest_after_the_processors(name: str) -> None:
    wanted, engine = ADJUSTMENTS[name], build("llama")
    sampling = SamplingParams(NUM_TOKENS, 0.0, adjustments=wanted)
    for length in LENGTHS:
        engine.add(replace(greedy(f"r{length}", prompt(length), NUM_TOKENS), sampling=sampling))
        engine.add(greedy(f"plain{length}", prompt(length), NUM_TOKENS))
    tokens = run(engine).tokens
    for length in LENGTHS:
        given, drawn = prompt(length), tokens[f"r{length}"]
        ids = torch.tensor([[*given, *drawn]], device="cuda")
        rows = logits_before(given, drawn)
        found: Any = processors(wanted, len(given))
        changed = torch.cat([found(ids[:, : len(given) + n], row.unsqueeze(0)) for n, row in enumerate(rows)])
        behind = changed.amax(-1) - changed.gather(-1, torch.tensor([drawn], device="cuda").T).squeeze(-1)
        # A penalty multiplies what rounding has changed.
        assert behind.max() < TIE * wanted.repetition_penalty, f"prompt of {length}: {behind.tolist()}"
    assert any(tokens[f"r{length}"] != tokens[f"plain{length}"] for length in LENGTHS)


def check(scored: list[DrawnToken], before: tuple[int, ...], num_top: int) -> None:
    """Logprobs of consecutive tokens behind these."""
    tokens = [token.token_id for token in scored]
    expected = logits_before(before, tokens).log_softmax(-1).cpu()
    for token, row in zip(scored, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TIE)
        assert [logprob for _, logprob in token.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=TIE)


@pytest.mark.parametrize("length", [2, 40, 257, 1500])
def test_logprobs_of_draws_and_of_prompts(length: int) -> None:
    engine, given = build("llama"), prompt(length)
    engine.add(greedy("beside", prompt(300), NUM_TOKENS))
    sampling = SamplingParams(NUM_TOKENS, 0.0, num_logprobs=3)
    engine.add(replace(greedy("r", given, NUM_TOKENS), sampling=sampling, num_prompt_logprobs=2))
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += [e for e in engine.step() if isinstance(e, TokenOutput) and e.request_id == "r"]
    assert tuple(token.token_id for token in outputs[0].prompt) == given[1:]
    check(list(outputs[0].prompt), given[:1], 2)
    check([token for output in outputs for token in output.draws], given, 3)
    assert engine.num_free_blocks == 64
