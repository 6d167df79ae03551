"""What is wrong with the files of a tokenizer is said before anything reads them, by the name of the file and field."""

import json
from pathlib import Path

import pytest

from deployments.engine.model.tokenizer_files import check_tokenizer
from deployments.errors import UnsupportedModelError

FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
ODD = [3, 2.5, True, [], ["</s>"], {}, {"content": None}, {"content": 5}, {"a": "b"}]
TOKEN = {"__type": "AddedToken", "content": "</s>", "lstrip": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_text("{}")
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        check_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"model {str(folder)!r}: ")


def change(folder: Path, name: str, **fields: object) -> None:
    (folder / name).write_text(json.dumps(fields))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b'{"a": 1', "is not JSON: "),
        (b"\xff\xfe\x00", "is not JSON: "),
        (b"[]", "holds no object"),
        (b"null", "holds no object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_holds_no_object_is_named(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    assert refusal(folder).startswith(f"{name} {reason}")


def test_a_folder_in_place_of_a_file_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    assert refusal(folder) == "tokenizer.json: Is a directory"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "value", [3, 2.5, True, [], ["</s>"], {}, {"content": None}, {"content": 5}, {"a": "b"}], ids=str
)
def test_a_special_token_that_is_no_text_is_named(folder: Path, name: str, value: object) -> None:
    change(folder, name, eos_token=value)
    assert refusal(folder) == f"{name}: eos_token is {value!r}: not the text of a token"


def test_special_tokens_are_texts_or_what_transformers_writes_for_them(folder: Path) -> None:
    more = {"additional_special_tokens": ["<a>", TOKEN], "extra_special_tokens": {"image_token": "<image>"}}
    change(folder, "tokenizer_config.json", eos_token="</s>", bos_token=None, unk_token=TOKEN, **more)
    change(folder, "special_tokens_map.json", eos_token={"content": "</s>", "lstrip": False})
    change(folder, "added_tokens.json", **{"<a>": 7})
    check_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": "</s>"}}, "eos_token is {'content': '</s>'}: not the"),
        ("tokenizer_config.json", {"extra_special_tokens": 3}, "extra_special_tokens is 3: not texts of tokens"),
        ("tokenizer_config.json", {"additional_special_tokens": [None]}, "additional_special_tokens is [None]: not"),
        ("special_tokens_map.json", {"extra_special_tokens": {"a": 3}}, "extra_special_tokens is {'a': 3}: not texts"),
        ("tokenizer_config.json", {"tokenizer_class": ["A"]}, "tokenizer_class is ['A']: not the name of a class"),
        ("added_tokens.json", {"<a>": "7"}, "'<a>' is '7': not a token id"),
        ("added_tokens.json", {"<a>": -1}, "'<a>' is -1: not a token id"),
    ],
)  # fmt: skip
def test_a_field_that_makes_no_tokenizer_is_named(
    folder: Path, name: str, fields: dict[str, object], reason: str
) -> None:
    change(folder, name, **fields)
    assert refusal(folder).startswith(f"{name}: {reason}")


def test_what_transformers_does_not_read_may_be_odd(folder: Path) -> None:
    change(folder, "tokenizer_config.json", added_tokens_decoder={})
    change(folder, "special_tokens_map.json", eos_token=3)
    change(folder, "added_tokens.json", **{"<a>": "7"})
    (folder / "tokenizer.model").write_bytes(b"")
    check_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    assert refusal(folder) == "tokenizer.model is empty"


def test_a_name_of_the_hub_is_left_to_whoever_fetches_it() -> None:
    check_tokenizer("owner/name")
