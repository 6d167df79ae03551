"""Engines around the small models, and what they are asked."""

import torch

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from tests.gpu.models import VOCAB_SIZE, loaded

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
