"""What steps need is compiled once an engine is ready: a kernel that compiles later holds everybody's tokens up."""

import random
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from deployments.engine.engine import Engine
from deployments.engine.execution.costs import StepCosts
from deployments.messages import SamplingParams
from tests.engine.driving import Transcript, greedy, run
from tests.gpu.driving import build, prompt

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from triton import knobs  # noqa: E402  # there only where a GPU is
from triton.runtime.jit import JITFunction  # noqa: E402

# What recorded parts of a step are taken to cost, beside launching all of it.
PARTS, WHOLE = 0.0, 1e9
# Draws of all kinds beside each other.
SAMPLINGS = (
    SamplingParams(max_tokens=9, temperature=0.0),
    SamplingParams(max_tokens=5, temperature=0.8, seed=1),
    SamplingParams(max_tokens=14, temperature=0.8, top_p=0.9, top_k=20, seed=2),
)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that this process has compiled, or fetched from the disk; those of earlier tests are forgotten."""
    for name, module in list(sys.modules.items()):
        if name.startswith("deployments.engine.kernels"):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
    seen: list[str] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        seen.append(f"{fn.name}: {compile['signature']}, {compile['constants']}, {compile['configs']}")

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    return seen


def serve(engine: Engine, seed: int, num_requests: int) -> None:
    """Requests of all lengths that come at any time; half of them begin as the one before."""
    chosen, transcript, given = random.Random(seed), Transcript(), prompt(1500)
    for number in range(num_requests):
        length = chosen.choice((chosen.randint(1, 40), chosen.randint(41, 400), chosen.randint(401, 1500)))
        tokens = given[:length] if number % 2 else prompt(1500 + 7 * number)[:length]
        engine.add(replace(greedy(f"{seed}-{number}", tokens, 9), sampling=chosen.choice(SAMPLINGS)))
        for _ in range(chosen.choice((0, 0, 1, 3))):
            transcript.note(engine.step())
    run(engine, transcript)


@pytest.mark.parametrize(
    ("family", "settings", "launch"),
    [
        ("gemma2", {}, PARTS),
        ("llama", {}, WHOLE),
        ("gemma2", {}, WHOLE),
        ("gpt_oss", {}, WHOLE),
        ("qwen3_moe", {}, WHOLE),
        ("llama", {"kv_dtype": "fp8"}, WHOLE),
        ("gemma2", {"kv_dtype": "fp8"}, WHOLE),
    ],
)
def test_no_step_compiles_anything(
    family: str, settings: dict[str, str], launch: float, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCosts, "parts_ms", lambda *_: launch)
    engine = build(family, max_num_seqs=40, num_blocks=120, max_num_batched_tokens=2048, **settings)
    assert len(compiled) > 10, "an engine compiles its kernels"
    compiled.clear()
    for seed in range(2):
        serve(engine, seed, 50)
    assert not compiled, "\n".join(compiled)
