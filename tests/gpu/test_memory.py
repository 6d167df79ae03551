"""An engine that takes what the GPU has left runs whatever its limits allow."""

from dataclasses import replace

import pytest
import torch

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.model.load import LoadedModel, prepare_model
from deployments.messages import GenerateRequest, SamplingParams
from tests.engine.driving import run
from tests.gpu.models import CONFIGS, loaded, plain

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


@pytest.mark.parametrize("family", sorted(CONFIGS))
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
    num_tokens = small_card // 6_600  # a token takes about 11 KB of a step
    with pytest.raises(ValueError, match=rf"steps beside .* max_num_batched_tokens \({num_tokens}\).*out of memory"):
        Engine(loaded("llama"), EngineConfig(max_num_batched_tokens=num_tokens, max_num_seqs=20_000))
