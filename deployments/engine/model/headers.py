"""What a checkpoint holds: names, shapes and types of its weights, read without the weights.

Called while a model is loaded, before anything is built or allocated by what its configuration says.
"""

import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from deployments.engine.model.files import read_json
from deployments.errors import UnsupportedModelError, brief

_NUMBER = re.compile(r"\.(\d+)\.")  # the first one in a weight's name is its layer's
_INTEGERS = re.compile(r"[IU]\d+|BOOL")  # in the headers of safetensors files
_OLD_FILE = "pytorch_model.bin"
# Of torch's types in older files; others have a name of torch's.
_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True, slots=True)
class Header:
    """One weight.

    Attributes:
        dtype: as safetensors files name it, such as BF16.
        file: its name; empty: not known.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str = ""

    @classmethod
    def of(cls, weight: torch.Tensor, file: str = "") -> Self:
        return cls(tuple(weight.shape), _NAMES.get(weight.dtype, str(weight.dtype)), file)

    @property
    def is_integer(self) -> bool:
        """Whole numbers, or truth values."""
        return _INTEGERS.fullmatch(self.dtype) is not None


class Headers(dict[str, Header]):
    """Weights of a checkpoint by their names."""

    @property
    def num_layers(self) -> int | None:
        """Layers that it has, at most; None: its names have no numbers."""
        numbers = [int(found[1]) for name in self if (found := _NUMBER.search(f".{name}")) is not None]
        return max(numbers) + 1 if numbers else None

    @property
    def largest(self) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the weight with the longest side."""
        name = max(self, key=lambda name: max(self[name].shape, default=1))
        return name, self[name].shape

    @property
    def dtype(self) -> torch.dtype | None:
        """Of all weights that are no whole numbers; None: they have several, or one that is not known."""
        names = {header.dtype for header in self.values() if not header.is_integer}
        return next((dtype for dtype, name in _NAMES.items() if names == {name}), None)

    @property
    def num_elements(self) -> int:
        return sum(math.prod(header.shape) for header in self.values())


def read_headers(path: str) -> Headers:
    """Headers of all weights; those of a hub's model are fetched with the weights, which loading finds then.

    Args:
        path: folder or hub id.

    Returns:
        None in there: the files are of a form that does not tell.

    Raises:
        UnsupportedModelError: a file cannot be read, or holds something else than weights, or what another one holds.
    """
    read, files = _read_new, weight_files(path)
    if not files:  # an older file beside newer ones is not loaded
        read, files = _read_old, weight_files(path, _OLD_FILE)
    headers = Headers()
    for file in files:
        read_here = _read(path, file, read)
        if twice := sorted(headers.keys() & read_here.keys()):  # transformers takes either, whatever the index says
            files_of = f"{headers[twice[0]].file} and {read_here[twice[0]].file}"
            raise UnsupportedModelError(f"model {path!r}: the checkpoint has {twice[0]} twice, in {files_of}")
        headers |= read_here
    if files and read is _read_new and not headers:
        raise UnsupportedModelError(f"model {path!r}: no weights in {Path(files[0]).name}")
    return headers


def _read(path: str, file: str, read: Callable[[str], Mapping[str, Header]]) -> Mapping[str, Header]:
    try:
        return read(file)
    except pickle.UnpicklingError as error:
        raise UnsupportedModelError(f"model {path!r}: {Path(file).name} {error}") from error
    except OSError as error:
        raise UnsupportedModelError(f"model {path!r}: {Path(file).name}: {brief(error)}") from error
    except SafetensorError as error:
        fault = f"{Path(file).name} is no whole safetensors file: {brief(error)}"
        raise UnsupportedModelError(f"model {path!r}: {fault}") from error


def weight_files(path: str, single: str = "model.safetensors") -> list[str]:
    """The files that hold the weights, of a hub's model once they are here; none, if it has none of this form.

    Args:
        path: folder or hub id.
        single: what it is called if there is one; those of an index otherwise.
    """
    if (found := _cached(path, single)) is not None:
        return [found]
    if (index := _cached(path, f"{single}.index.json")) is None:
        return []
    names = sorted(set(read_json(path, Path(index))["weight_map"].values()))
    return [found for name in names if (found := _cached(path, name)) is not None]


def _cached(path: str, name: str) -> str | None:
    found: str | None = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return found


def _read_new(file: str) -> Mapping[str, Header]:
    headers = {}
    with safe_open(file, "pt") as content:
        for name in content.keys():  # noqa: SIM118  # no mapping
            weight = content.get_slice(name)
            headers[name] = Header(tuple(weight.get_shape()), weight.get_dtype(), Path(file).name)
    return headers


def _read_old(file: str) -> Mapping[str, Header]:
    """Of a pickle in a zip archive; those from before torch 1.6 do not tell without being read.

    Raises:
        UnpicklingError: it holds something else than weights by their names. Nothing of it is run.
    """
    try:
        weights = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError("holds objects other than tensors, whose code is not run") from error
    except Exception:  # loading says what is wrong with it
        return {}
    if not isinstance(weights, Mapping):
        raise pickle.UnpicklingError(f"holds no weights by their names, but a {type(weights).__name__}")
    headers = {
        name: Header.of(weight, Path(file).name)
        for name, weight in weights.items()
        if isinstance(name, str) and isinstance(weight, torch.Tensor)
    }
    if not headers:
        keys = ", ".join(repr(key) for key in list(weights)[:3]) or "nothing"
        raise pickle.UnpicklingError(f"holds no weights by their names, but {keys}")
    return headers
