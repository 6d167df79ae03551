"""Engines around the small models, and what they are asked."""

from collections.abc import Collection, Iterator

import torch

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from tests.engine.driving import greedy, run
from tests.gpu.models import VOCAB_SIZE, exact, loaded, plain

NUM_TOKENS = 24
LENGTHS = (1, 2, 40, 255, 256, 257, 700, 1500)
# Two tokens whose logits are nearer than this are a tie: in bfloat16 logits of this size are multiples of 1/16, and
# each may be rounded to another one.
TIE = 0.13


def build(family: str, **overrides: object) -> Engine:
    settings = {"num_blocks": 64, "max_num_seqs": 20, "max_num_batched_tokens": 4096} | overrides
    return Engine(loaded(family), EngineConfig.model_validate(settings))


def prompt(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist())


def generate(engine: Engine, lengths: Collection[int] = LENGTHS) -> dict[str, list[int]]:
    """What follows prompts of these lengths, all at once; by names that end in the length."""
    for length in lengths:
        engine.add(greedy(f"r{length}", prompt(length), NUM_TOKENS))
    tokens = run(engine).tokens
    assert all(tokens[f"r{length}"] for length in lengths)
    return tokens


def few_blocks(family: str) -> int:
    """Nine of each group of layers."""
    return 9 * len(loaded(family).kv_shape.groups)


def generate_preempted(engine: Engine) -> Iterator[dict[str, list[int]]]:
    """As `generate`, in few blocks of 256 tokens, twice; then what fits, twice: some of it is cached."""
    for lengths in [(200, 255, 256, 500, 511, 700)] * 2 + [(200, 500, 700)] * 2:
        yield generate(engine, lengths)
    assert engine.stats().preemptions > 0 and engine.stats().prefix_hit_tokens > 0


@torch.inference_mode()
def check_greedy(family: str, given: tuple[int, ...], tokens: list[int]) -> None:
    """Each token is the likeliest after those before it, or tied with it: in bfloat16, or in float32, where it errs."""
    ids = torch.tensor([[*given, *tokens]], device="cuda")
    behind = []
    for model in (plain(family), exact(family)):
        logits = model(ids, use_cache=False).logits[0, len(given) - 1 : -1].float()
        behind.append(logits.amax(-1) - logits.gather(-1, ids[0, len(given) :, None])[:, 0])
    least = torch.stack(behind).amin(0)
    assert least.max() < TIE, f"prompt of {len(given)}: behind the likeliest by {[part.tolist() for part in behind]}"
