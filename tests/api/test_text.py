"""Encoding against transformers, and what the tokenizer says of itself."""

from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from deployments.api.text import TextCodec
from deployments.errors import InvalidRequestError
from tests.api.fakes import END_ID, build_codec, build_tokenizer
from tests.api.tokenizer_kinds import TEXTS


@pytest.mark.parametrize("text", [*TEXTS, "", "<|im_start|>user"])
def test_encode_is_what_the_tokenizer_gives(smollm2: TextCodec, smollm2_folder: Path, text: str):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert smollm2.encode(text) == tokenizer(text)["input_ids"]


def test_encode_chat_is_what_the_template_gives(smollm2: TextCodec, smollm2_folder: Path):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi 👋"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2.encode_chat(messages) == expected


def test_a_saved_truncation_does_not_shorten_prompts():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert len(TextCodec(tokenizer).encode("abcdef")) == 6


def test_a_model_without_a_template_says_so():
    with pytest.raises(InvalidRequestError, match="no chat template"):
        TextCodec(build_tokenizer(chat_template=None)).encode_chat([{"role": "user", "content": "hi"}])


def test_what_the_template_refuses_is_the_requests_fault():
    with pytest.raises(InvalidRequestError, match="no tools here") as caught:
        build_codec().encode_chat([{"role": "tool", "content": "42"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("named", "expected"), [("<end>", (END_ID,)), (AddedToken("<end>"), (END_ID,)), ("!", (ord("!"),)), (None, ())]
)
def test_the_tokenizer_names_its_end_token(named: str | AddedToken | None, expected: tuple[int, ...]):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = named
    assert TextCodec(tokenizer).end_token_ids == expected


def test_the_first_id_of_a_vocabulary_can_end_a_text():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    assert TextCodec(tokenizer).end_token_ids == (0,)


def test_an_end_token_that_the_vocabulary_lacks_is_no_other():
    tokenizer = build_tokenizer()
    tokenizer.unk_token = "!"
    tokenizer.eos_token = "<nowhere>"
    assert tokenizer.eos_token == "<nowhere>" and tokenizer.eos_token_id == ord("!")
    assert TextCodec(tokenizer).end_token_ids == ()
