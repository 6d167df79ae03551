"""The engine with keys and values in FP8 on a GPU: on whatever way, a token is as likely as rounding allows."""

import copy
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from deployments.engine.engine import Engine
from deployments.engine.model.load import prepare_model
from deployments.messages import ChunkReady
from tests.engine.driving import Transcript, greedy, prefill_all, run
from tests.engine.rounded import rounded_logits
from tests.gpu.driving import NUM_TOKENS, TIE, generate, generate_preempted, prompt
from tests.gpu.driving import build as build_engine
from tests.gpu.models import plain

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def reference(family: str) -> PreTrainedModel:
    model = copy.deepcopy(plain(family))
    prepare_model(model, "random", torch.device("cuda"))
    return model


def build(family: str, **overrides: object) -> Engine:
    return build_engine(family, kv_dtype="fp8", **overrides)


def num_behind(family: str, tokens: dict[str, list[int]], *, rounds: bool = True) -> int:
    """How many tokens are further behind the likeliest than a tie."""
    found = 0
    for name, drawn in tokens.items():
        assert len(drawn) == NUM_TOKENS
        given = prompt(int(name[1:]))
        logits = rounded_logits(reference(family), (*given, *drawn), rounds=rounds)[len(given) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(drawn, device="cuda").unsqueeze(-1)).squeeze(-1)
        found += int((logits.amax(-1) - chosen > TIE).sum())
    return found


def check(family: str, tokens: dict[str, list[int]]) -> None:
    """A key that differs in its last bit may be rounded to another code, so a few tokens may be behind."""
    behind, without = num_behind(family, tokens), num_behind(family, tokens, rounds=False)
    num_tokens = NUM_TOKENS * len(tokens)
    print(f"{family}: {behind} of {num_tokens} tokens behind, {without} if nothing were rounded")
    assert behind <= 0.03 * num_tokens


@every_family
@pytest.mark.parametrize("budget", [4096, 300])
def test_prompts_of_all_lengths_together(family: str, budget: int) -> None:
    engine = build(family, max_num_batched_tokens=budget)
    check(family, generate(engine))
    assert engine.num_free_blocks == 64


@every_family
def test_preemption_and_a_warm_cache(family: str) -> None:
    for tokens in generate_preempted(build(family, num_blocks=9)):
        check(family, tokens)


def test_a_handed_over_prompt_continues_and_takes_half_the_bytes() -> None:
    source, target = build("llama", max_num_batched_tokens=512), build("llama")
    request, transcript = greedy("r1500", prompt(1500), NUM_TOKENS), Transcript()
    target.add(request, remote_threshold=100)
    transcript.note(target.step())
    for chunk, tensor in prefill_all(source, request):
        assert isinstance(chunk, ChunkReady) and tensor.dtype is torch.uint8
        assert tensor.nbytes == chunk.num_blocks * 256 * 3 * 2 * 2 * (64 + 4)
        transcript.note(target.import_chunk(chunk, tensor))
    check("llama", run(target, transcript).tokens)


def test_twice_as_many_blocks_fit() -> None:
    num_bytes, numbers = 1 << 26, 256 * 3 * 2 * 2 * 64
    plain_blocks, blocks = (
        build_engine("llama", num_blocks=None, kv_cache_bytes=num_bytes, kv_dtype=kv_dtype).limits.num_blocks
        for kv_dtype in ("auto", "fp8")
    )
    assert (plain_blocks, blocks) == (num_bytes // (2 * numbers), num_bytes // (numbers * 68 // 64))
