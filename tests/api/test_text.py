"""Encoding against transformers, detokenizing against `decode`, over real and made-up tokenizers."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import Decoder
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deployments.api.text import TextCodec
from deployments.errors import InvalidRequestError, UnsupportedModelError
from tests.api.fakes import END_ID, build_codec, build_tokenizer

TEXTS = [
    "plain words, and 'quotes'.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 at the end 🎉",
    "日本語のテキストと한국어 텍스트",
    "e\u0301 combining, na\u0308ive, नमस्ते, ကမ္ဘာ",
    "  spaces   and\n\nnew\tlines  ",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    "▁▁",
    "▁hello",
    "▁wor",
    "ld",
    "é",
    "日",
    "本",
    ".",
    "a",
    "e",
    "\u0301",
    "##ing",
    "'",
    "\N{REPLACEMENT CHARACTER}",
]
DECODERS: dict[str, Decoder | None] = {
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "bpe-suffix": decoders.BPEDecoder("ld"),
    "none": None,
}
SPECIALS = ["<unk>", "<s>", "</s>"]
NUM_IDS = len(SPECIALS) + len(BYTE_TOKENS) + len(WORDS)


def build_sentencepiece(decoder: Decoder | None) -> TextCodec:
    """A vocabulary as SentencePiece writes it: special tokens, then all bytes, then pieces."""
    vocab = {token: token_id for token_id, token in enumerate([*SPECIALS, *BYTE_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


CODECS = {name: build_sentencepiece(decoder) for name, decoder in DECODERS.items()} | {"byte-level": build_codec()}


def detokenize(codec: TextCodec, batches: list[list[int]]) -> list[str]:
    detokenizer = codec.detokenizer()
    return [*(detokenizer.push(batch) for batch in batches), detokenizer.flush()]


def decode(codec: TextCodec, token_ids: list[int]) -> str:
    text = codec._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


# Ids beyond the vocabulary come from models whose embedding is padded.
any_id = st.integers(0, NUM_IDS + 4)
word_id = st.integers(NUM_IDS - len(WORDS), NUM_IDS - 1)
character_ids = st.characters(codec="utf-8").map(lambda c: [len(SPECIALS) + byte for byte in c.encode()])
batches_of_ids = st.lists(
    st.one_of(st.lists(any_id, max_size=4), st.lists(word_id, max_size=3), character_ids), max_size=15
)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150, deadline=None)
@given(batches=batches_of_ids)
def test_pieces_join_to_what_decode_gives(name: str, batches: list[list[int]]):
    codec = CODECS[name]
    assert "".join(detokenize(codec, batches)) == decode(codec, [i for batch in batches for i in batch])


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(st.lists(st.one_of(st.integers(0, 49_200), st.integers(17, 300)), max_size=4), max_size=20))
def test_pieces_of_the_real_tokenizer_join_to_what_decode_gives(smollm2: TextCodec, batches: list[list[int]]):
    assert "".join(detokenize(smollm2, batches)) == decode(smollm2, [i for batch in batches for i in batch])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte-level", "smollm2", "gemma"])
def test_text_survives_encoding_and_detokenizing_token_by_token(smollm2: TextCodec, name: str, text: str):
    codec = smollm2 if name == "smollm2" else CODECS[name]
    token_ids = codec.encode(text)
    pieces = detokenize(codec, [[token_id] for token_id in token_ids])
    assert "".join(pieces) == decode(codec, token_ids)
    if name != "gemma":  # its pre-tokenizer adds a space in front
        assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_character_waits_for_its_last_byte_and_no_longer():
    codec = build_codec()
    pieces = detokenize(codec, [[byte] for byte in "a😀b".encode()])
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_a_byte_run_ends_with_the_next_word():
    codec = CODECS["llama"]
    pieces = detokenize(codec, [*([len(SPECIALS) + byte] for byte in "日".encode()), [NUM_IDS - len(WORDS) + 2]])
    assert pieces == ["", "", "", "日 hello", ""]


def test_a_long_byte_run_streams_before_it_ends():
    codec = CODECS["llama"]
    text = "ကမ္ဘာကြီးပါ" * 20
    pieces = detokenize(codec, [[len(SPECIALS) + byte] for byte in text.encode()])
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 30


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character():
    assert detokenize(build_codec(), [list("é".encode()[:1])]) == ["", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("name", ["byte-level", "llama"])
def test_detokenizing_garbage_takes_linear_time(name: str):
    continuation = 0x80 if name == "byte-level" else len(SPECIALS) + 0x80

    def seconds(num_tokens: int) -> float:
        detokenizer = CODECS[name].detokenizer()
        start_s = time.thread_time()
        for _ in range(num_tokens):
            detokenizer.push([continuation])
        return time.thread_time() - start_s

    # Linear is 8 times as long, quadratic 64 times.
    assert min(seconds(16_000) for _ in range(3)) < 30 * min(seconds(2_000) for _ in range(3))


def test_special_tokens_have_no_text():
    assert "".join(detokenize(build_codec(), [[ord("a"), END_ID, ord("b")]])) == "ab"


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


def test_a_decoder_that_would_be_detokenized_wrongly_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with pytest.raises(UnsupportedModelError, match="mixes ByteLevel"):
        TextCodec(tokenizer)
