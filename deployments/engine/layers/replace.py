"""What is done to a model's layers after it was loaded, from the top down: faster ones that compute the same."""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.engine.config import EngineConfig
from deployments.engine.kv.cache import KVShape
from deployments.engine.layers.cpu import fuse_decoder_layers
from deployments.engine.layers.fused import CPU_KERNELS, fuse_layers
from deployments.engine.layers.linear import convert_linears
from deployments.engine.layers.merged import merge_linears
from deployments.errors import UnsupportedModelError


def replace_layers(
    model: PreTrainedModel,
    config: EngineConfig,
    kv_shape: KVShape,
    *,
    attention_rotates: bool,
    inputs_wanted: Collection[int] = (),
) -> None:
    """Replace layers of a model, in place. Each step finds what the one before has left.

    Args:
        model: as it was loaded, its attention set to ours.
        config: of the engine.
        kv_shape: of the model.
        attention_rotates: attention's kernels rotate queries and keys, where a layer leaves it to them.
        inputs_wanted: decoder layers whose inputs others look at.

    Raises:
        UnsupportedModelError: experts are to stay in MXFP4, and cannot.
    """
    is_on_cuda = _has_kernels(model.device, model.dtype)
    keeps_mxfp4 = config.quantization == "mxfp4"
    if keeps_mxfp4:
        check_mxfp4(model.device, model.dtype)
    # Linear layers that read the same input become one. First: these are plain still, and their weights lie as loaded.
    merge_linears(model)
    # Each linear layer is put into the form in which it is kept and multiplied.
    convert_linears(model, config)
    # Norms, gated MLPs and rotary embeddings become one kernel each. An MLP is built around its linear layers' last
    # form, and tried with it.
    if is_on_cuda:
        _fuse_on_cuda(model, attention_rotates, keeps_mxfp4)
    elif model.device.type != "cuda" and model.dtype is torch.float32:
        fuse_layers(model, CPU_KERNELS)
        # Last, since it takes whole decoder layers apart, and tries what it makes of them.
        fuse_decoder_layers(model, kv_shape, inputs_wanted)


def check_mxfp4(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to keep experts in MXFP4 where no kernel reads them.

    Raises:
        UnsupportedModelError: says where there are some.
    """
    if not _has_kernels(device, dtype):
        raise UnsupportedModelError(
            "quantization is mxfp4, for which there are kernels on a GPU, in bfloat16 and float16; the model is in"
            f" {dtype} on {device}"
        )


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def replace_head_layers(head: nn.Module, config: EngineConfig) -> None:
    """The same for a head that guesses for a model on a GPU; it rotates nothing by functions of transformers' names."""
    from deployments.engine.layers import cuda, skinny  # Triton is there only where a GPU is

    merge_linears(head)
    convert_linears(head, config)
    fuse_layers(head, cuda.KERNELS_WITHOUT_ROTARY)
    skinny.fuse_gates(head)


def _fuse_on_cuda(model: PreTrainedModel, attention_rotates: bool, keeps_mxfp4: bool) -> None:
    # Triton is there only where a GPU is.
    from deployments.engine.layers import cuda, cuda_decoder, cuda_fp8, replace_experts, skinny

    fuse_layers(model, cuda.KERNELS if attention_rotates else cuda.KERNELS_WITHOUT_ROTARY)
    skinny.fuse_gates(model)
    replace_experts.fuse_experts(model)
    if keeps_mxfp4:
        replace_experts.pack_experts(model)
    # Decoder layers add to their residuals in kernels of their blocks, which are to be in place.
    cuda_decoder.fuse_residuals(model)
    # What a decoder layer's products take in FP8 is rounded by the kernel before them.
    cuda_fp8.round_in_norms(model)
    # Last, since it is the whole model that is tried.
    if attention_rotates:
        cuda.keep_rotary_where_it_is_wanted(model)
        cuda.leave_norms_to_attention(model)
