"""A head with the layers and the attention of a GPU, by Triton's interpreter, beside its own modules. In float16."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from tests.engine.faked_gpu import FakeGraph  # before what needs Triton

from deployments.engine.config import EngineConfig, EngineLimits  # isort: skip
from deployments.engine.execution import cuda_heads
from deployments.engine.execution.cuda_heads import CudaHead
from deployments.engine.execution.heads import KnownTokens, NewestTokens
from deployments.engine.execution.portable_heads import PortableHead
from deployments.engine.layers import linear, replace, skinny
from deployments.engine.model.eagle3 import Eagle3Form, Eagle3Head
from deployments.engine.sampling.guessing import GuessDraws
from deployments.engine.sampling.sampler import SamplingPreparation
from deployments.messages import SamplingParams
from tests.engine.families import CPU
from tests.tiny_models import INTERPRETED

LIMITS = EngineLimits(
    max_model_len=128, block_size=64, num_blocks=4, max_num_seqs=2, max_num_batched_tokens=16, max_drafts=3
)
# Two sequences behind 6 and 3 known tokens.
COUNTS, BLOCKS = np.array([6, 3]), np.array([2, 1])


def random_head() -> Eagle3Head:
    torch.manual_seed(0)
    config = LlamaConfig(**(INTERPRETED | {"num_hidden_layers": 1}), head_dim=16)
    head = Eagle3Head(Eagle3Form(config, (0, 1, 2), config.hidden_size, 40, False, False))
    for weight in head.parameters():
        weight.data = torch.randn(weight.shape) * (weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2)
        weight.data += weight.dim() == 1
    head.half().complete(nn.Embedding(config.vocab_size, config.hidden_size).half(), torch.arange(40) + 7)
    return head


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> Eagle3Head:
    """The same, as `replace_head_layers` leaves it on a GPU."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kwargs: allocate(*size, **kwargs))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(cuda_heads, "record", lambda graph, run, pool: graph.record(run))
    kind = linear.LinearKind("skinny", lambda layer, _: type(layer) is nn.Linear, skinny.SkinnyLinear)
    monkeypatch.setattr(linear.convert_linears, "__defaults__", ((kind,),))
    head = copy.deepcopy(random_head())
    replace.replace_head_layers(head, EngineConfig())
    head.leave_rotary()
    return head


def test_its_kv_and_its_guesses_are_those_of_its_modules(converted: Eagle3Head) -> None:
    plain = random_head()
    assert not any(type(module) is nn.Linear for module in converted.modules())
    runners = CudaHead(converted, LIMITS, CPU), PortableHead(plain, LIMITS, CPU)
    states, owners = torch.randn(COUNTS.sum(), plain.hidden_size).half(), np.repeat(np.arange(2), COUNTS)
    positions = np.concatenate([np.arange(count) for count in COUNTS])
    token_ids = np.arange(len(owners)) * 5 % 64
    known = KnownTokens(np.arange(len(owners)), token_ids, positions, BLOCKS[owners] * 64 + positions)
    last = np.cumsum(COUNTS) - 1
    newest = NewestTokens(last, token_ids[last], COUNTS - 1, 0 * COUNTS, BLOCKS[:, None], np.array([3, 2]))
    told = []
    for runner in runners:
        runner.cache.blocks[:] = 0  # of the recordings
        runner.learn(states, known)
        greedy = GuessDraws(SamplingPreparation(), [SamplingParams(9, temperature=0.0)] * 2, COUNTS + 1, [None] * 2)
        told.append(runner.guess(states, newest, greedy))
    ours, theirs = (runner.cache.blocks.float() for runner in runners)
    assert theirs[:, :, 2, :6].all() and not theirs[:, :, 2, 8:].any()
    assert (ours - theirs).norm() < 3e-3 * theirs.norm()
    assert told[0] == told[1] and list(map(len, told[0])) == [3, 2]
    assert all(token in range(7, 47) for guesses in told[0] for token in guesses)
