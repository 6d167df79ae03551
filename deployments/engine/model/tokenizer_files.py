"""Looks at the files of a model's tokenizer before anything reads them: each holds JSON, and special tokens are texts.

transformers takes whatever stands there, and ends in an error that names neither the file nor the field. Knows neither
torch nor transformers. Called before a server starts, and by whoever reads the tokenizer; what only reading shows,
`api/tokenizer.py` says.
"""

from collections.abc import Iterator
from typing import Any

from deployments.engine.model.bounds import shown
from deployments.engine.model.files import check_file, local_path, read_json, refusal, refusing_unreadable

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_JSON = (_CONFIG, "tokenizer.json", _MAP, "added_tokens.json")
# What a tokenizer is made of where there is no `tokenizer.json`.
_OLDER = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
# As transformers calls them.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MORE = ("additional_special_tokens", "extra_special_tokens")


def check_tokenizer(model: str) -> None:
    """Refuse a folder whose tokenizer cannot be read, as far as can be told without reading it.

    Args:
        model: what the user calls it; that of a hub's model or a GGUF file is not looked at.

    Raises:
        UnsupportedModelError: one line that names the model, the file and the field.
    """
    folder = local_path(model)
    if folder is None or not folder.is_dir():
        return
    with refusing_unreadable(model):
        for name in (*_JSON, *(() if (folder / "tokenizer.json").exists() else _OLDER)):
            if (folder / name).exists():
                check_file(model, folder / name)
        found = {name: read_json(model, folder / name) for name in _JSON if (folder / name).exists()}
    if "added_tokens_decoder" in found.get(_CONFIG, {}):  # newer, in place of the other files
        found = {_CONFIG: found[_CONFIG]}
    for name in (_CONFIG, _MAP):
        for fault in _faults(found.get(name, {}), needs_type=name == _CONFIG):
            raise refusal(model, f"{name}: {fault}")
    for token, token_id in found.get("added_tokens.json", {}).items():
        if type(token_id) is not int or token_id < 0:
            raise refusal(model, f"added_tokens.json: {token!r} is {shown(token_id)}: not a token id")


def _faults(values: dict[str, Any], *, needs_type: bool) -> Iterator[str]:
    for field in _NAMED:
        if (value := values.get(field)) is not None and not _is_token(value, needs_type):
            yield f"{field} is {shown(value)}: not the text of a token"
    for field in _MORE:
        value = values.get(field) or []
        tokens = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not all(_is_token(token, needs_type) for token in tokens):
            yield f"{field} is {shown(value)}: not texts of tokens"
    if not isinstance(named := values.get("tokenizer_class"), str | None):
        yield f"tokenizer_class is {shown(named)}: not the name of a class"


def _is_token(value: Any, needs_type: bool) -> bool:
    """Whether it is a text, or what transformers writes for one with further properties."""
    if isinstance(value, dict):
        return isinstance(value.get("content"), str) and (not needs_type or value.get("__type") == "AddedToken")
    return isinstance(value, str)
