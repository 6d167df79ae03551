"""An engine that takes what the GPU has left runs whatever its limits allow."""

from dataclasses import replace

import pytest
import torch

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.model.load import LoadedModel, prepare_model
from deployments.engine.scheduling.scheduler import MAX_VERIFIED_TOKENS
from deployments.messages import Adjustments, GenerateRequest, SamplingParams
from tests.engine.driving import run
from tests.engine.insides import tell_of_verifications
from tests.gpu.models import CONFIGS, EXPERTS, LONG, VOCAB_SIZE, loaded, plain

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("small_card")]
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

NUM_SEQS, LONGEST, NUM_TOKENS = 40, 4096, 3


def request(number: int, length: int) -> GenerateRequest:
    prompt = torch.randint(0, 3000, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, top_k=50, top_p=0.9, seed=number)
    return GenerateRequest(f"r{number}", tuple(prompt), sampling)


def run_corners(engine: Engine) -> None:
    longest = LONGEST - NUM_TOKENS
    for lengths in ([longest] * NUM_SEQS, [3] * NUM_SEQS, [longest, *[700] * (NUM_SEQS - 1)], [longest]):
        for number, length in enumerate(lengths):
            engine.add(request(number, length))
        tokens = run(engine).tokens
        assert [len(tokens[f"r{i}"]) for i in range(len(lengths))] == [NUM_TOKENS] * len(lengths)


@pytest.mark.parametrize("family", sorted(CONFIGS | EXPERTS))
@pytest.mark.parametrize("budget", [2048, 32768])
def test_the_corners_run_in_what_is_left(family: str, budget: int) -> None:
    engine = Engine(loaded(family), EngineConfig(max_num_seqs=NUM_SEQS, max_num_batched_tokens=budget))
    free, total = torch.cuda.mem_get_info()
    assert free < 0.15 * total, "the pool takes what the steps leave"
    run_corners(engine)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_portable_runner_keeps_within_it_too(family: str) -> None:
    engine = Engine(in_float32(family), EngineConfig(max_num_seqs=NUM_SEQS, max_num_batched_tokens=8192))
    run_corners(engine)


def test_penalties_of_many_drafts_behind_long_contexts_keep_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 draws with 65,000 tokens before each: more than the margin, were all of them penalized at once."""
    seen: list[int] = []
    tell_of_verifications(monkeypatch, lambda arrays, size: seen.append(arrays.num_tokens))
    speculation = {"method": "ngram", "max_drafts": 64, "is_adaptive": False}
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 8192, "speculation": speculation}
    engine = Engine(loaded("long"), EngineConfig.model_validate(settings))
    said, num_tokens = 7, 200
    length = LONG["long"].max_position_embeddings - num_tokens
    prompt = torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt[-80:] = [said] * 80
    sampling = SamplingParams(num_tokens, 0.0, adjustments=Adjustments(((said, 100.0),), 1.1, 0.1, 0.1))
    for names in (["first"], [f"r{number}" for number in range(8)]):  # which then find its KV in the cache
        for name in names:
            engine.add(GenerateRequest(name, tuple(prompt), sampling))
        tokens = run(engine).tokens
        assert all(tokens[name] == [said] * num_tokens for name in names)
    assert max(seen) == MAX_VERIFIED_TOKENS


def in_float32(family: str) -> LoadedModel:
    model = plain(family).float()
    try:
        return replace(prepare_model(model, "random", torch.device("cuda")), has_cuda_layers=False)
    finally:
        plain.cache_clear()


def test_a_pool_that_does_not_fit_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"a KV pool of \d+ blocks \(\d+\.\d+ GiB\) does not fit .* max_num_seqs"):
        Engine(loaded("llama"), EngineConfig(kv_cache_bytes=1 << 40))


def test_steps_that_do_not_fit_are_refused_with_the_limits(small_card: int) -> None:
    left = 2 << 30
    taken = torch.empty(small_card - left - torch.cuda.memory_reserved(), dtype=torch.uint8, device="cuda")
    num_tokens = left // 6_600  # a token takes about 11 KB of a step
    num_seqs = 1 + num_tokens // LONGEST  # one step computes prompts of so many tokens in all
    with pytest.raises(ValueError, match=rf"steps beside .* max_num_batched_tokens \({num_tokens}\).*out of memory"):
        Engine(loaded("llama"), EngineConfig(max_num_batched_tokens=num_tokens, max_num_seqs=num_seqs))
    del taken
