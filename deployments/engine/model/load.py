"""Finds, checks and loads the model. What the engine cannot run is refused here, by the name of the layer.

Called once, when an engine starts. Where a model is, `resolve.py` knows; what its files say, `checkpoint.py`;
which weights it has, `weights.py`.
"""

import logging
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from transformers import PreTrainedModel

from deployments.engine.attention.base import IMPLEMENTATION, register
from deployments.engine.config import EngineConfig
from deployments.engine.kv.cache import KVShape
from deployments.engine.layers.fp8 import quantize_weights
from deployments.engine.layers.replace import check_mxfp4, replace_head_layers, replace_layers
from deployments.engine.model.checkpoint import naming, read_checkpoint
from deployments.engine.model.eagle3 import Eagle3Head
from deployments.engine.model.eagle3_files import load_eagle3
from deployments.engine.model.end_tokens import end_token_ids
from deployments.engine.model.probe import probe_kv_shape
from deployments.engine.model.resolve import resolve_model
from deployments.engine.model.rope import separate_lengths, waits_for_device
from deployments.engine.model.same_vocabulary import check_same_vocabulary
from deployments.engine.model.served import check_config
from deployments.engine.model.weights import load_weights
from deployments.engine.scheduling.positions import FIXED, PositionRule

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what was learned while loading it.

    Attributes:
        model: in inference mode, its attention set to ours.
        path: the folder or hub id it came from, tokenizer included.
        fingerprint: tells models apart whose KV must not be mixed; the same in every process that loads the same one.
        device: where it is.
        kv_shape: KV of one token.
        max_model_len: what it was made for, in tokens.
        positions: what its rotary embedding needs to know of a sequence.
        vocab_size: rows of the output layer.
        eos_token_ids: ids that end a text, as far as the model's configuration says.
        has_cuda_layers: its layers are those of a GPU (`layers/replace.py`), which only `CudaRunner` can run.
        drafter: a smaller model with the same vocabulary, which guesses what this one will draw; None: none does.
        head: of this model, which guesses likewise; None: none does.
    """

    model: PreTrainedModel
    path: str
    fingerprint: str
    device: torch.device
    kv_shape: KVShape
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    positions: PositionRule = FIXED
    has_cuda_layers: bool = False
    drafter: "LoadedModel | None" = None
    head: Eagle3Head | None = None

    def bytes_of_pool_block(self, block_size: int) -> int:
        """KV of a block of the pool, with that of the model or head that guesses."""
        guessing = 0 if self.drafter is None else self.drafter.bytes_of_pool_block(block_size)
        guessing += 0 if self.head is None else self.head.kv_shape.bytes_of_pool_block(block_size)
        return self.kv_shape.bytes_of_pool_block(block_size) + guessing


def load_model(config: EngineConfig) -> LoadedModel:
    """Load and check a model, and the one or the head that guesses for it if there is to be one.

    Raises:
        UnsupportedModelError: one is not there, not whole, or the engine cannot run it, or they do not fit each other;
            names what is at fault.
    """
    head = config.speculation.model if config.speculation.method == "eagle3" else None
    loaded = _load(config, config.model, head)
    if config.speculation.model is None or head is not None:
        return loaded
    # Nobody asks the smaller one for experts.
    changes = {"quantization": None} if config.quantization == "mxfp4" else {}
    drafter = _load(config.model_copy(update=changes), config.speculation.model, is_drafter=True)
    check_same_vocabulary(loaded.path, loaded.vocab_size, drafter.path, drafter.vocab_size)
    return replace(loaded, drafter=drafter)


def _load(config: EngineConfig, name: str, head: str | None = None, *, is_drafter: bool = False) -> LoadedModel:
    register()
    path = resolve_model(name)
    device = _choose_device(config.device)
    torch.empty(0, device=device)  # raises here, if there is none: no fault of the model
    with naming(path):
        checkpoint = read_checkpoint(path)
        dtype: torch.dtype | str = _DTYPES.get(config.dtype, torch.float32 if device.type == "cpu" else "auto")
        options = {"dtype": dtype, "device_map": device, "attn_implementation": IMPLEMENTATION}
        known: Any = dtype if dtype != "auto" else checkpoint.config.dtype or checkpoint.headers.dtype
        if config.quantization == "mxfp4" and known is not None:
            check_mxfp4(device, known)
        keeps = _keeps_mxfp4(config, device, known)
        to_fp8 = config.quantization == "fp8"
        model = load_weights(path, checkpoint.config, checkpoint.headers, keeps_mxfp4=keeps, to_fp8=to_fp8, **options)
        if to_fp8:
            quantize_weights(model)
        loaded = replace(prepare_model(model, path, device), eos_token_ids=checkpoint.end_token_ids)
        if is_drafter:  # its KV lies in blocks of the same numbers as one group's of the model that it guesses for
            loaded = replace(loaded, kv_shape=loaded.kv_shape.keeping_all)
        return optimize_layers(loaded if head is None else _with_head(loaded, head), config)


def _keeps_mxfp4(config: EngineConfig, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether experts in MXFP4 stay as they are: where kernels read them, and faster than widened ones if not asked."""
    kinds = {None: (torch.bfloat16,), "mxfp4": (torch.bfloat16, torch.float16)}
    return device.type == "cuda" and dtype in kinds.get(config.quantization, ())


def _with_head(loaded: LoadedModel, name: str) -> LoadedModel:
    return replace(loaded, head=load_eagle3(resolve_model(name), loaded.model, loaded.model.config))


def optimize_layers(loaded: LoadedModel, config: EngineConfig | None = None) -> LoadedModel:
    """Replace layers of a model, in place, by faster ones that compute the same.

    Args:
        loaded: as `prepare_model` leaves it.
        config: of the engine; None: the defaults.

    Returns:
        The same model, and whether its layers are those of a GPU now.
    """
    is_known = _is_known_to_cuda(loaded.model, loaded.kv_shape)
    wanted = () if loaded.head is None else loaded.head.layers
    replace_layers(
        loaded.model, config or EngineConfig(), loaded.kv_shape, attention_rotates=is_known, inputs_wanted=wanted
    )
    if is_known and loaded.head is not None and _are_kernels_for(loaded.head.kv_shape):
        replace_head_layers(loaded.head, config or EngineConfig())
        loaded.head.leave_rotary()
    return replace(loaded, has_cuda_layers=is_known)


def _are_kernels_for(kv_shape: KVShape) -> bool:
    from deployments.engine.attention.cuda import unknown_to_cuda  # Triton is there only where a GPU is

    return unknown_to_cuda(kv_shape) is None


def _is_known_to_cuda(model: PreTrainedModel, kv_shape: KVShape) -> bool:
    """Whether attention runs through kernels of our own, in CUDA graphs."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    from deployments.engine.attention.cuda import unknown_to_cuda  # Triton is there only where a GPU is

    unknown = unknown_to_cuda(kv_shape)
    if unknown is None and waits_for_device(model):
        unknown = "rotary embeddings that wait for the device, which a CUDA graph cannot"
    if unknown is not None:
        logger.info("attention runs without kernels of our own: it does not know %s", unknown)
    return unknown is None


def prepare_model(model: PreTrainedModel, path: str, device: torch.device) -> LoadedModel:
    """Check a model that is in memory and learn its KV shape by running two tokens through it.

    Raises:
        UnsupportedModelError: see `load_model`.
    """
    check_config(model.config)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    model.eval().requires_grad_(False)
    text_config = model.config
    positions, longest = separate_lengths(model)
    named = {
        name: getattr(getattr(model, name, None), "eos_token_id", None) for name in ("config", "generation_config")
    }
    return LoadedModel(
        model=model,
        path=path,
        fingerprint=_fingerprint(model),
        device=device,
        kv_shape=probe_kv_shape(model, device),
        max_model_len=longest,
        positions=positions,
        vocab_size=text_config.vocab_size,
        eos_token_ids=end_token_ids(named, text_config.vocab_size),
    )


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _fingerprint(model: PreTrainedModel) -> str:
    """Hash of the configuration and of a sample of every weight."""
    digest = blake2b(repr(sorted(model.config.to_diff_dict().items(), key=str)).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return f"{model.config.model_type}-{digest.hexdigest()}"
