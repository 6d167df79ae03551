"""A GGUF file with wrong bytes in it is refused by what is wrong, soon, or is the model that it says it is."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from deployments.engine.model.gguf import write_dense
from deployments.engine.model.resolve import resolve_model
from deployments.errors import UnsupportedModelError
from tests.engine.families import small_model
from tests.engine.gguf_files import write_gguf
from tests.tiny_models import FOR_A_FILE

NUM_DAMAGED = 60


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    model = small_model("LlamaConfig", **FOR_A_FILE)
    (file,) = write_gguf(tmp_path / "files" / "m.gguf", model)
    return file


def refusal(file: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"model {str(file)!r}: ")


def put(file: Path, after: bytes, distance: int, value: int, num_bytes: int) -> None:
    """Write a number so far behind a name's end."""
    content = bytearray(file.read_bytes())
    place = content.index(after) + len(after) + distance
    content[place : place + num_bytes] = value.to_bytes(num_bytes, "little")
    file.write_bytes(content)


@pytest.mark.parametrize("key", ["block_count", "context_length", "embedding_length", "attention.head_count"])
def test_a_number_without_which_there_is_no_model_is_missed_by_its_name(file: Path, key: str) -> None:
    # Not `head_count_kv`, which begins alike: the length of a name stands before it.
    name = f"llama.{key}".encode()
    before = len(name).to_bytes(8, "little")
    file.write_bytes(file.read_bytes().replace(before + name, before + b"x" * len(name)))
    assert refusal(file) == f"it lacks llama.{key}"


def test_the_epsilon_of_norms_is_not_made_up(file: Path) -> None:
    name = b"llama.attention.layer_norm_rms_epsilon"
    file.write_bytes(file.read_bytes().replace(name, b"x" * len(name)))
    assert refusal(file) == f"it lacks {name.decode()}"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        # Behind a name: the type of its value, and of a list that of its elements and their number.
        (lambda file: put(file, b"tokenizer.ggml.token_type", 8, 2**40, 8), "a list of 1099511627776 elements at"),
        (lambda file: put(file, b"general.architecture", 4, 2**62, 8), "a text of 4611686018427387904 bytes at byte "),
        (lambda file: put(file, b"llama.block_count", 0, 77, 4), " is not a valid GGUFValueType"),
        # Behind a tensor's name: how many sides, two sides, its type, its place.
        (lambda file: put(file, b"token_embd.weight", 0, 9, 4), "tensor b'token_embd.weight' has 9 dimensions; 4 are"),
        (lambda file: put(file, b"token_embd.weight", 20, 99, 4), "(99) is not a valid GGMLQuantizationType"),
        (lambda file: put(file, b"token_embd.weight", 4, 2**33, 8), "it has "),
        (lambda file: put(file, b"blk.0.attn_q.weight", 24, 32, 8), "tensor blk.0.attn_q.weight at byte "),
    ],
    ids=["list", "text", "kind", "sides", "type", "size", "place"],
)  # fmt: skip
def test_a_wrong_number_in_the_description_is_named(file: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(file)
    message = refusal(file)
    assert message.startswith("not readable, perhaps truncated (ValueError: ") and reason in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", "one", "llama.block_count is 'one': must be a whole number"),
        ("llama.attention.head_count", 4.0, "llama.attention.head_count is 4.0: must be a whole number"),
        ("tokenizer.ggml.eot_token_id", "two", "its metadata makes no model (ValueError: invalid literal for int()"),
    ],
)
def test_a_value_of_another_type_is_refused(file: Path, key: str, value: object, message: str) -> None:
    model = small_model("LlamaConfig", **FOR_A_FILE)
    (other,) = write_gguf(file.with_name("o.gguf"), model, metadata={key: value})
    assert refusal(other).startswith(message)


def test_a_part_that_is_damaged_is_named(file: Path) -> None:
    model = small_model("LlamaConfig", **FOR_A_FILE)
    first, second, *_ = write_gguf(file.with_name("s.gguf"), model, max_tensors=4)
    put(second, b"GGUF", 4, 2**50, 8)
    assert str(second) in refusal(first) and "1125899906842624 tensors; 524288 are allowed" in refusal(first)


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_has_it_fail_in_another_way(file: Path, seed: int, tmp_path: Path) -> None:
    whole, rng = file.read_bytes(), random.Random(seed)
    described = int(GGUFReader(file).data_offset)
    tokens, merges = whole.index(b"tokenizer.ggml.tokens"), whole.index(b"tokenizer.ggml.merges")
    places = [place for place in range(4, described) if not tokens + 40 < place < merges]
    num_refused = 0
    for number in range(NUM_DAMAGED // 3):
        content = bytearray(whole)
        place = rng.choice(places)
        content[place : place + 1] = bytes([content[place] ^ 1 << rng.randrange(8)])
        file.write_bytes(content)
        (folder := tmp_path / str(number)).mkdir()
        try:
            write_dense([file], folder)
        except UnsupportedModelError:
            num_refused += 1
    assert num_refused > NUM_DAMAGED // 10
