"""What is wrong with a model's files is said early, in one line, by the name of the file."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deployments.engine.model import files
from deployments.engine.model.files import check_model, gguf_shards, local_path, within
from deployments.errors import UnsupportedModelError


def safetensors(num_bytes: int = 16) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(num_bytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a space in its name, whole as far as names and headers tell."""
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def refusal(model: object) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        check_model(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shard(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_whole_folder_is_let_through(folder: Path) -> None:
    check_model(str(folder))
    shard(folder, "one.safetensors", "two.safetensors")
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").write_bytes(safetensors())
    check_model(str(folder))


def test_what_guesses_for_a_model_needs_no_tokenizer_of_its_own(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert "no tokenizer in this folder" in refusal(str(folder))
    check_model(str(folder), has_tokenizer=False)
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        check_model(str(folder), has_tokenizer=False)


def test_a_folder_is_found_from_the_home_folder_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    check_model("~/a model")
    assert refusal("~/another") == "model '~/another': no such folder"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "model '/no/such/folder': no such folder"),
        ("./nowhere", "model './nowhere': no such folder"),
        ("/no/such.gguf", "model '/no/such.gguf': no such file"),
        ("models/deep/below", "neither a folder or file that is there, nor a hub id (OWNER/NAME)"),
        ("my model", "neither a folder or file that is there, nor a hub id (OWNER/NAME)"),
    ],
)
def test_a_mistyped_model_is_named(model: str, message: str) -> None:
    assert message in refusal(model)


def test_an_empty_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"model '{tmp_path}': no config.json in this folder"
    (tmp_path / "x.gguf").write_bytes(b"")
    assert "did you mean x.gguf?" in refusal(tmp_path)


def test_a_file_that_is_no_model_is_refused(folder: Path) -> None:
    assert "neither a folder nor a .gguf file" in refusal(folder / "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json is not JSON"),
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds no object"),
        ("[" * 200_000, "config.json is nested too deeply"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "config.json: a number is too long"),
    ],
    ids=lambda text: text[:30],
)
def test_a_configuration_that_cannot_be_read_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    assert message in refusal(folder)


def test_a_folder_without_weights_or_with_an_adapter_alone_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights in this folder" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter (adapter_config.json), not a whole model" in refusal(folder)


def test_an_adapter_is_told_by_its_base_model_with_or_without_a_configuration(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(safetensors())
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert refusal(folder).endswith("not a whole model; merge it into its base model, 'owner/base'")


def test_an_adapter_beside_a_whole_model_is_not_passed_over(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    check_model(str(folder))  # left by whoever merged it
    (folder / "adapter_model.safetensors").write_bytes(safetensors())
    assert "both a whole model (model.safetensors) and an adapter (adapter_model.safetensors)" in refusal(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", ""])
def test_shards_outside_of_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "x.safetensors").write_bytes(safetensors())
    shard(folder, name)
    assert f"model.safetensors.index.json names files outside of this folder: {name!r}" in refusal(folder)


def test_a_shard_of_another_kind_than_its_index_is_named(folder: Path) -> None:
    (folder / "one.safetensors").write_bytes(safetensors())
    shard(folder, "one.safetensors", "config.json")
    message = "model.safetensors.index.json names 'config.json' as one of its files, which is no .safetensors file"
    assert message in refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer in this folder" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.safetensors is empty"),
        (safetensors()[:4], "model.safetensors is truncated"),
        (safetensors()[:20], "model.safetensors is truncated"),
        (safetensors()[:-1], "model.safetensors is truncated"),
        (safetensors() + b"x", "model.safetensors is too long"),
        (b"\x04\0\0\0\0\0\0\0nope", "model.safetensors has no readable header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
    ],
)
def test_weights_that_are_not_whole_are_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert message in refusal(folder)
    shard(folder, "one.safetensors")
    (folder / "one.safetensors").write_bytes(content)
    assert message.replace("model.", "one.") in refusal(folder)


def test_a_header_that_is_nested_without_end_is_refused(folder: Path) -> None:
    header = b"[" * 200_000
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors has no readable header" in refusal(folder)


def test_no_more_of_a_header_is_read_than_the_format_allows(folder: Path) -> None:
    length = 5 * 10**9
    with open(folder / "model.safetensors", "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)  # takes no place
    assert f"model.safetensors has a header of {length} bytes; the format allows 100000000" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_where_a_file_should_be_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refusal(folder) == f"model '{folder}': {name}: Is a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    assert refusal(folder) == f"model '{folder}': {name}: Permission denied"


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UnsupportedModelError, match=r"config\.json is no regular file"):
        check_model(str(folder))


def test_a_path_that_the_system_does_not_take_is_named() -> None:
    assert refusal("/" + "a" * 300).endswith("a: File name too long")


def test_a_truncated_pickle_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("data", bytes(1000))
    check_model(str(folder))
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[:-30])
    assert "pytorch_model.bin is truncated" in refusal(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    shard(folder, *(f"{number}.safetensors" for number in range(5)))
    (folder / "0.safetensors").write_bytes(safetensors())
    message = "names files that are missing: 1.safetensors, 2.safetensors, 3.safetensors and 1 more"
    assert message in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "model.safetensors.index.json has no weight_map" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "0.safetensors"}}')
    assert "model.safetensors.index.json has no metadata" in refusal(folder)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    assert "x.gguf is not a GGUF file" in refusal(tmp_path / "x.gguf")


def test_the_parts_of_a_split_file_are_known_by_any_of_them(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert gguf_shards(parts[1]) == parts
    assert gguf_shards(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]
    parts[1].write_bytes(b"GGUF")
    assert "m-00001-of-00003.gguf is missing" in refusal(parts[1])


def test_an_id_of_the_hub_is_not_taken_for_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_path("Qwen/Qwen3-0.6B") is None
    monkeypatch.chdir(folder.parent)
    assert local_path("a model") == Path("a model")


def test_a_hub_that_cannot_be_reached_is_named_with_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refusal("owner/name-that-nobody-has")
    assert "no such folder, and the hub at http://127.0.0.1:9: cannot be reached (ConnectError" in message


def test_a_hub_that_says_nothing_is_waited_for_no_longer_than_allowed() -> None:
    never = files.threading.Event()  # type: ignore[attr-defined]
    try:
        assert within(0.01, lambda: str(never.wait()), "no answer") == "no answer"
    finally:
        never.set()
    assert within(60, lambda: None, "no answer") is None


def test_the_check_loads_neither_torch_nor_transformers() -> None:
    script = "import sys, app.local; assert not {'torch', 'transformers'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=Path(__file__).parents[2])
