"""Decoder layers that run as compiled code on a CPU: which ones, and that they compute what the modules did."""

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from deployments.engine.config import EngineConfig
from deployments.engine.kernels.cpu_layers import run_layers
from deployments.engine.layers import cpu
from deployments.engine.layers.cpu import fuse_decoder_layers
from deployments.engine.layers.fused import CPU_KERNELS, fuse_layers
from deployments.engine.layers.linear import convert_linears
from deployments.engine.layers.merged import merge_linears
from deployments.engine.model.load import prepare_model
from deployments.engine.model.probe import probe_kv_shape
from tests.engine.families import CPU, build_model
from tests.engine.insides import probe_step


def fuse(family: str, change: Any = lambda model: None) -> tuple[Any, int]:
    """A model, packed, and how many of its layers became compiled code; `change` comes before."""
    model = prepare_model(copy.deepcopy(build_model(family)), "", CPU).model
    merge_linears(model)
    convert_linears(model, EngineConfig())
    fuse_layers(model, CPU_KERNELS)
    change(model)
    return model, fuse_decoder_layers(model, probe_kv_shape(model, CPU))


@torch.inference_mode()
def num_calls(model: Any) -> int:
    """Of compiled code, for all layers of a step of a small Llama."""
    shape = prepare_model(copy.deepcopy(build_model("llama")), "", CPU).kv_shape
    step, tokens = probe_step(shape), torch.arange(5).unsqueeze(0)
    with patch.object(cpu, "run_layers", wraps=run_layers) as run:
        model(input_ids=tokens, position_ids=tokens, use_cache=False, paged_step=step)
    return run.call_count


def test_layers_that_follow_each_other_run_in_one_call() -> None:
    assert num_calls(fuse("llama")[0]) == 1


def test_layers_run_one_by_one_where_the_model_does_something_between_them() -> None:
    def scale(model: Any) -> None:
        def hook(_layer: Any, _args: Any, kwargs: Any, out: Tensor) -> Tensor:
            return 1.5 * out if kwargs["position_ids"].max() < 8192 else out  # not where the layer is tried alone

        model.model.layers[0].register_forward_hook(hook, with_kwargs=True)

    model, num_fused = fuse("llama", scale)
    assert num_fused == 2 and num_calls(model) == 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral_windowed", "phi3"])
def test_layers_of_llamas_kind_are_replaced(family: str) -> None:
    assert fuse(family)[1] == 2


def test_a_layer_that_does_not_rotate_stays_beside_those_that_do() -> None:
    model, num_fused = fuse("smollm3")
    assert num_fused == 2 and "forward" not in vars(model.model.layers[1])


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "olmo2", "mixtral", "glm4"])
def test_layers_of_other_kinds_stay_as_they_are(family: str) -> None:
    assert fuse(family)[1] == 0


def test_a_layer_that_writes_other_keys_stays_as_it_is() -> None:
    """Its output is the same where no other token has been seen."""

    def shift(model: Any) -> None:
        for layer in model.model.layers:
            attend = layer.self_attn.forward

            def forward(*args: Any, position_embeddings: Any, of: Any = attend, **kwargs: Any) -> Any:
                cos, sin = position_embeddings
                return of(*args, position_embeddings=(cos, 1.01 * sin), **kwargs)

            layer.self_attn.forward = forward

    assert fuse("llama", shift)[1] == 0


def test_a_layer_that_scales_its_input_by_far_positions_stays_as_it_is() -> None:
    def scale(model: Any) -> None:
        for layer in model.model.layers:

            def forward(x: Tensor, *, position_ids: Tensor, of: Any = layer.forward, **kwargs: Any) -> Any:
                far = 1 + position_ids // 8192
                return of(x * far.unsqueeze(-1), position_ids=position_ids, **kwargs)

            layer.forward = forward

    assert fuse("llama", scale)[1] == 0
