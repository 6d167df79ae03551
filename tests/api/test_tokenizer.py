"""A tokenizer is read, or refused in one line that names the model, the file and the field that is to blame."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer
from deployments.errors import UnsupportedModelError
from tests.api.fakes import END_ID, build_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def change(folder: Path, name: str, **fields: Any) -> None:
    file = folder / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | fields))


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        read_tokenizer(str(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message.removeprefix(f"model {str(folder)!r}: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64.0, "rms_norm_eps": "1e-6"},
        {"num_attention_heads": 0},
        {"tie_word_embeddings": "false", "eos_token_id": "2"},
        {"model_type": "newer"},
        {"tokenizer_class": 3},
    ],
    ids=str,
)
def test_fields_of_the_model_that_say_nothing_of_its_tokenizer_do_not_matter(
    folder: Path, changes: dict[str, Any]
) -> None:
    change(folder, "config.json", **changes)
    codec = TextCodec(read_tokenizer(str(folder)))
    assert (codec.encode("hi"), codec.end_token_ids) == ([104, 105], (END_ID,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token", 3),
        ("eos_token", ["</s>"]),
        ("eos_token", {"content": None}),
        ("pad_token", {"__type": "AddedToken", "content": 5}),
        ("extra_special_tokens", 3),
        ("added_tokens_decoder", None),
        ("tokenizer_class", []),
        ("auto_map", None),
        ("padding_side", "up"),
        ("split_special_tokens", "no"),
        ("model_input_names", 3),
    ],
)
def test_a_field_that_makes_no_tokenizer_is_named_with_its_file(folder: Path, field: str, value: object) -> None:
    change(folder, "tokenizer_config.json", **{field: value})
    assert refusal(folder).startswith(f"tokenizer_config.json: {field} is {value!r}: ")


def test_a_field_of_the_older_files_is_named_with_its_file(folder: Path) -> None:
    change(folder, "special_tokens_map.json", unk_token=3)
    assert refusal(folder).startswith("special_tokens_map.json: unk_token is 3: ")


def test_code_of_the_models_own_is_not_run(folder: Path) -> None:
    change(
        folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="OwnTokenizer"
    )
    assert refusal(folder).startswith(
        "tokenizer_config.json: auto_map is {'AutoTokenizer': ['own.Own', None]}: ValueErr"
    )


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000], ids=lambda content: content[:8])
def test_a_file_that_holds_no_object_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    assert refusal(folder).startswith(f"{name} holds no JSON object: ")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_vocabulary_that_is_cut_off_is_named(folder: Path, share: float) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[: int(share * len(whole))])
    assert refusal(folder).startswith("tokenizer.json: EOF while parsing")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert refusal(folder).startswith(
        "its tokenizer cannot be read: ValueError: Couldn't instantiate the backend token"
    )


def test_a_tokenizer_that_some_texts_make_fail_is_refused(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))).save_pretrained(
        tmp_path
    )
    assert refusal(tmp_path).startswith("its tokenizer encodes no text: WordLevel error: Missing [UNK] token")


def test_a_tokenizer_that_panics_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    template = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", END_ID)])
    content = json.loads(file.read_text()) | {"post_processor": json.loads(template.__getstate__())}
    del content["post_processor"]["special_tokens"]["<end>"]
    file.write_text(json.dumps(content))
    assert refusal(folder).startswith("its tokenizer encodes no text: PanicException: ")


# --- beside a model


def build_codec(single: str = "$A") -> TextCodec:
    """Ids 0 to 255 are bytes, `<end>` is 256 and `<begin>` 300."""
    tokenizer = build_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(f"<{number}>", special=True) for number in range(257, 300)])
    backend.add_special_tokens([AddedToken("<begin>", special=True)])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<begin>", 300)])
    return TextCodec(tokenizer)


def test_tokens_that_the_model_lacks_are_told(caplog: pytest.LogCaptureFixture) -> None:
    build_codec().check_vocabulary(301)
    assert caplog.text == ""
    build_codec().check_vocabulary(300)
    assert "the tokenizer has tokens up to '<begin>', id 300, and the model's ids are 0 to 299" in caplog.text


def test_a_token_that_begins_every_prompt_and_that_the_model_lacks_is_refused() -> None:
    build_codec("<begin> $A").check_vocabulary(301)
    with pytest.raises(
        UnsupportedModelError, match="adds '<begin>', id 300, to every prompt, and the model's ids are 0"
    ):
        build_codec("<begin> $A").check_vocabulary(300)
