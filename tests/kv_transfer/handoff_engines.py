"""Engine actors around a small model with random weights, on a GPU where there is one, that say what tests must see."""

import gc
import os
from functools import cache
from typing import TYPE_CHECKING

import ray
import torch

from deployments.engine.config import EngineConfig
from deployments.engine_actor import EngineActor
from deployments.engine_builder import BuiltEngine, assemble_engine
from deployments.engine_tier import fetching
from deployments.kv_tier import policy
from deployments.kv_tier.settings import TierSettings
from deployments.kv_transfer import direct
from deployments.kv_transfer.base import TransferStats

if TYPE_CHECKING:
    from deployments.engine.model.load import LoadedModel

NUM_GPUS = min(2, torch.cuda.device_count())
ON_GPU = NUM_GPUS > 0
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BLOCK_SIZE = 256 if ON_GPU else 16
NUM_BLOCKS = 64
VOCAB_SIZE = 3000
PATIENCE_S = 120.0


@cache
def load() -> "LoadedModel":
    """The same weights in every process."""
    # Not above: the tier's index, which gets handles of these engines, would load it all as well.
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deployments.engine.model.load import optimize_layers, prepare_model
    from tests.tiny_models import NARROW, ON_A_GPU

    longest = {"max_position_embeddings": NUM_BLOCKS * BLOCK_SIZE // 2}
    config = LlamaConfig(**((ON_A_GPU if ON_GPU else NARROW) | longest))
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    if not ON_GPU:
        return prepare_model(model.eval(), "random", DEVICE)
    model = model.to(DEVICE, torch.bfloat16).eval()
    return optimize_layers(prepare_model(model, "random", DEVICE))


def build(config: EngineConfig) -> BuiltEngine:
    """The engine of an actor."""
    torch.set_num_threads(1)
    return assemble_engine(load(), config)


class WatchedEngine(EngineActor):
    """One block per step and chunk; a prompt's last one comes layer by layer.

    With a tier, and then alone, it keeps what it has computed.
    """

    def __init__(self, share_kv: bool, tier: TierSettings | None = None) -> None:
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=4,
            max_num_batched_tokens=BLOCK_SIZE,
            enable_prefix_caching=tier is not None,
            share_kv=share_kv,
            handoff_layer_parts=2,
            lease_s=PATIENCE_S,  # nobody renews it
        )
        # A tier that is late on a busy machine is waited for all the same.
        fetching._LOOKUP_TIMEOUT_S = policy._UNMEASURED_PATIENCE_S = PATIENCE_S
        super().__init__(config, build, tier)

    @ray.method(concurrency_group="ctl")
    def transfer_stats(self) -> TransferStats:
        return direct.stats()

    @ray.method(concurrency_group="ctl")
    def pid(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group="ctl")
    def num_searched_objects(self) -> int:
        """That are looked through for garbage; others were there before the first request."""
        gc.collect()
        return len(gc.get_objects())
