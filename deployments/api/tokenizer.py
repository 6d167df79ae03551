"""Reads a model's tokenizer from its folder. The one place that needs transformers, which imports torch if it can.

What it reads is plain and can be pickled, so that it may be read in another process: `TextCodec` is made of it.
Whatever goes wrong is told as one error that names the file and, where one is to blame, the field.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from deployments.api.chat_template import read_legacy_template
from deployments.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

_FILE = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Of a model's configuration, what says which tokenizer it has.
_NAMING = ("tokenizer_class", "model_name")
_MAX_REASON = 300
# Letters, bytes and white space that no small vocabulary has all of: what cannot be encoded is to be shown.
_TRIAL = "Aé日\U0001f600\u0378 \t\n~"


class AnyTokenizer(Protocol):
    """What `TextCodec` needs of a tokenizer; transformers' own have it, too."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    @property
    def chat_template(self) -> object: ...

    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...

    @property
    def eos_token(self) -> object: ...


@dataclass(frozen=True, slots=True)
class ReadTokenizer:
    """What was read of a tokenizer.

    Attributes:
        backend_tokenizer: does the work.
        chat_template: one, or several by name, or none.
        special_tokens_map: what templates may name.
        eos_token: what ends a text; None: nothing is named.
    """

    backend_tokenizer: Tokenizer
    chat_template: object
    special_tokens_map: Mapping[str, object]
    eos_token: str | None


def read_tokenizer(path: str) -> ReadTokenizer:
    """Read the tokenizer in the folder, or of the hub id, `path`; takes seconds.

    Raises:
        UnsupportedModelError: it cannot be read or encodes no text, or is not of the kind that can be detokenized piece
            by piece; names the model and what is at fault.
    """
    try:
        tokenizer = _load(path)
    except BaseException as error:  # transformers and tokenizers raise whatever a file makes them stumble over
        _check_fault(error)
        raise UnsupportedModelError(f"model {path!r}: {_fault(path, error)}") from error
    end = tokenizer.eos_token
    return ReadTokenizer(
        backend_tokenizer=_backend_of(path, tokenizer),
        chat_template=tokenizer.chat_template or read_legacy_template(path),
        special_tokens_map=tokenizer.special_tokens_map,
        eos_token=None if end is None else str(end),
    )


def _load(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, config=_read_names(path), trust_remote_code=False)


def _read_names(path: str) -> PretrainedConfig:
    """As much of the model's configuration as says which tokenizer it has.

    The engine forgives fields of the wrong type, and transformers would not; they say nothing of tokenizers.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    values, _ = PretrainedConfig.get_config_dict(path)
    model_type = values.get("model_type")
    config = PretrainedConfig()
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_type]()
    config._name_or_path = path
    for name in _NAMING:
        if isinstance(value := values.get(name), str):
            setattr(config, name, value)
    return config


def _check_fault(error: BaseException) -> None:
    """Let pass what is no fault of a file; a panic of Rust is one, and no `Exception`."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error


def _fault(path: str, error: BaseException) -> str:
    """The file and the field without which the tokenizer could be read; what was said, if there are none."""
    folder = Path(path)
    if (reason := _why_unreadable(folder / _FILE)) is not None:
        return f"{_FILE}: {reason}"
    reason = _one_line(error)
    for name in filter(lambda name: (folder / name).is_file(), _SETTINGS):
        values = _read_object(folder / name)
        if values is None:
            return f"{name} holds no JSON object: {reason}"
        for field, value in values.items():
            if _reads_without(folder, name, values, field):
                return f"{name}: {field} is {reprlib.repr(value)}: {reason}"
    return f"its tokenizer cannot be read: {reason}"


def _why_unreadable(file: Path) -> str | None:
    from tokenizers import Tokenizer

    if not file.is_file():
        return None
    try:
        Tokenizer.from_file(str(file))
    except BaseException as error:
        _check_fault(error)
        return _one_line(error)
    return None


def _read_object(file: Path) -> dict[str, object] | None:
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _reads_without(folder: Path, name: str, values: Mapping[str, object], field: str) -> bool:
    """Whether all is well with the files but for a field of one of them."""
    with TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            if file.name != name:
                (Path(scratch) / file.name).symlink_to(file.absolute())
        (Path(scratch) / name).write_text(json.dumps({key: value for key, value in values.items() if key != field}))
        try:
            _load(scratch)
        except BaseException as error:  # whatever it is, this field alone is not to blame
            _check_fault(error)
            return False
    return True


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:_MAX_REASON]
    return text if type(error) is Exception else f"{type(error).__name__}: {text}"


def _backend_of(path: str, tokenizer: Any) -> Tokenizer:
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise UnsupportedModelError(f"model {path!r}: {kind} is not backed by the tokenizers library")
    try:
        backend.encode(_TRIAL)
    except BaseException as error:
        _check_fault(error)
        raise UnsupportedModelError(f"model {path!r}: its tokenizer encodes no text: {_one_line(error)}") from error
    return backend
