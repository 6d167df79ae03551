"""Which tokens end a text: all that a model's files name, and nothing else."""

import json
from pathlib import Path

import pytest

from deployments.engine.model.end_tokens import end_token_ids, read_end_token_ids
from deployments.errors import UnsupportedModelError


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        (None, 2, (2,)),
        (0, None, (0,)),
        (0, [5, 6], (0, 5, 6)),
        ([1, 2], 3, (1, 2, 3)),
        ([1, 2], 0, (0, 1, 2)),
        ([], [], ()),
        (2, [2, 2], (2,)),
        (2.0, None, (2,)),
        (-1, 100, ()),
        (99, None, (99,)),
    ],
)
def test_what_each_place_names_is_united(config: object, generation: object, expected: tuple[int, ...]) -> None:
    assert end_token_ids({"config": config, "generation_config": generation}, vocab_size=100) == expected


@pytest.mark.parametrize("value", ["2", True, 2.5, float("nan"), [1, None], [[2]], {"id": 2}])
def test_what_is_no_token_id_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"^config\.json: eos_token_id .* is neither an id nor a list of ids"
    ):
        end_token_ids({"config.json": value}, vocab_size=100)


def write(folder: Path, name: str, **fields: object) -> None:
    (folder / name).write_text(json.dumps(fields))


def test_both_files_are_read(tmp_path: Path) -> None:
    write(tmp_path, "config.json", model_type="llama", eos_token_id=[0, 7])
    write(tmp_path, "generation_config.json", eos_token_id=3)
    assert read_end_token_ids(str(tmp_path), 100) == (0, 3, 7)


def test_a_default_of_the_models_class_is_no_end_token(tmp_path: Path) -> None:
    write(tmp_path, "config.json", model_type="llama")
    assert read_end_token_ids(str(tmp_path), 100) == ()
    write(tmp_path, "generation_config.json", eos_token_id=5)
    assert read_end_token_ids(str(tmp_path), 100) == (5,)


def test_a_nested_configuration_is_read(tmp_path: Path) -> None:
    write(tmp_path, "config.json", model_type="some", text_config={"eos_token_id": 9})
    assert read_end_token_ids(str(tmp_path), 100) == (9,)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]", b"3"])
def test_a_file_that_is_there_and_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, "config.json", model_type="llama", eos_token_id=7)
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json cannot be read: "):
        read_end_token_ids(str(tmp_path), vocab_size=100)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_file_is_named_that_has_no_token_id(tmp_path: Path, name: str) -> None:
    write(tmp_path, "config.json", model_type="llama")
    write(tmp_path, name, model_type="llama", eos_token_id=["2"])
    with pytest.raises(UnsupportedModelError, match=f"{tmp_path}/{name}: eos_token_id "):
        read_end_token_ids(str(tmp_path), vocab_size=100)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_file_is_named_whose_end_token_is_not_in_the_vocabulary(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "config.json", model_type="llama")
    write(tmp_path, name, model_type="llama", eos_token_id=[7, 100])
    assert read_end_token_ids(str(tmp_path), vocab_size=100) == (7,)
    assert f"{tmp_path}/{name}: eos_token_id 100 is never drawn, ids are 0 to 99" in caplog.text
