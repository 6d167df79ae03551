"""Detokenizing piece by piece against `decode` of everything, for tokenizers of every kind."""

import codecs
import time
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from deployments.api.detokenizer import DetokenizerFactory
from deployments.api.text import TextCodec
from deployments.errors import UnsupportedModelError
from tests.api.fakes import END_ID, build_codec, build_tokenizer, letter_of
from tests.api.tokenizer_kinds import (
    BYTE_TOKENS,
    CODECS,
    FIRST_BYTE_ID,
    FIRST_WORD_ID,
    NUM_WORD_IDS,
    SPECIALS,
    TEXTS,
    TRAINED_CODECS,
    WORDS,
)

BYTE_OF_LETTER = {letter_of(byte): byte for byte in range(256)}
SENTENCEPIECE_KINDS = ["llama-legacy", "llama-first", "gemma-trained", "unigram-always", "unigram-never"]


def detokenize(
    codec: TextCodec, batches: list[list[int]], prompt: list[int] | None = None, *, skip_special_tokens: bool = True
) -> list[str]:
    detokenizer = codec.detokenizers.build(prompt or [], skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.push(batch) for batch in batches), detokenizer.flush()]


def decode(codec: TextCodec, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
    text = codec.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)
    return text


def flat(batches: list[list[int]]) -> list[int]:
    return [token_id for batch in batches for token_id in batch]


def is_byte_level(codec: TextCodec) -> bool:
    return isinstance(codec.backend.decoder, decoders.ByteLevel)


def byte_values(codec: TextCodec, token_ids: list[int], *, skip_special_tokens: bool) -> list[bytes | None]:
    """The bytes that each visible token stands for; None: it stands for text, not bytes."""
    tokens = [codec.backend.id_to_token(token_id) for token_id in token_ids]
    shown = [t for t in tokens if t is not None and not (skip_special_tokens and t in {*SPECIALS, "<end>"})]
    if is_byte_level(codec):
        return [bytes(BYTE_OF_LETTER[letter] for letter in token) for token in shown]
    falls_back = "ByteFallback" in str(codec.backend.decoder)
    return [bytes([BYTE_TOKENS.index(t)]) if falls_back and t in BYTE_TOKENS else None for t in shown]


def text_of_prompt(codec: TextCodec, prompt: list[int], *, skip_special_tokens: bool) -> str:
    """What a reader of the prompt has read of it: all but a character that it leaves unfinished."""
    values = byte_values(codec, prompt, skip_special_tokens=skip_special_tokens)
    if is_byte_level(codec):
        text, _ = codecs.utf_8_decode(b"".join(value or b"" for value in values), "replace", False)
        return text
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for value in values:
        decoder.reset() if value is None else decoder.decode(value)
    num_unfinished, left = len(decoder.getstate()[0]), list(prompt)
    while num_unfinished:
        num_unfinished -= bool(byte_values(codec, [left.pop()], skip_special_tokens=skip_special_tokens))
    return decode(codec, left, skip_special_tokens=skip_special_tokens)


def cuts_a_broken_run(codec: TextCodec, prompt: list[int], output: list[int], *, skip_special_tokens: bool) -> bool:
    """Does a run of byte tokens that is no UTF-8 span the end of the prompt? `decode` judges it as a whole."""
    if is_byte_level(codec):
        return False
    before = byte_values(codec, prompt, skip_special_tokens=skip_special_tokens)
    after = byte_values(codec, output, skip_special_tokens=skip_special_tokens)
    run = b""
    for value in reversed(before):
        if value is None:
            break
        run = value + run
    if not run:
        return False
    for value in after:
        if value is None:
            break
        run += value
    return run.decode(errors="replace").encode() != run


# Ids beyond the vocabulary come from models whose embedding is padded.
any_id = st.integers(0, NUM_WORD_IDS + 4)
word_id = st.integers(FIRST_WORD_ID, NUM_WORD_IDS - 1)
character_ids = st.characters(codec="utf-8").map(lambda c: [FIRST_BYTE_ID + byte for byte in c.encode()])
batches_of_ids = st.lists(
    st.one_of(st.lists(any_id, max_size=4), st.lists(word_id, max_size=3), character_ids), max_size=15
)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=80)
@given(batches=batches_of_ids, skip_special_tokens=st.booleans())
def test_pieces_join_to_what_decode_gives(name: str, batches: list[list[int]], skip_special_tokens: bool):
    codec = CODECS[name]
    pieces = detokenize(codec, batches, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces) == decode(codec, flat(batches), skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=120)
@given(batches=batches_of_ids, data=st.data(), skip_special_tokens=st.booleans())
def test_prompt_and_pieces_read_like_decode_of_all_wherever_the_prompt_ends(
    name: str, batches: list[list[int]], data: st.DataObject, skip_special_tokens: bool
):
    codec, token_ids = CODECS[name], flat(batches)
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt, output = token_ids[:cut], token_ids[cut:]
    pieces = detokenize(codec, [[i] for i in output], prompt, skip_special_tokens=skip_special_tokens)
    assume(not cuts_a_broken_run(codec, prompt, output, skip_special_tokens=skip_special_tokens))
    before = text_of_prompt(codec, prompt, skip_special_tokens=skip_special_tokens)
    assert before + "".join(pieces) == decode(codec, token_ids, skip_special_tokens=skip_special_tokens)
    assert codec.detokenizers.read_prompt(prompt, skip_special_tokens=skip_special_tokens) == before


@pytest.mark.parametrize("name", TRAINED_CODECS)
@settings(max_examples=60)
@given(text=st.one_of(st.text(max_size=20), st.sampled_from(TEXTS)), data=st.data())
def test_a_text_cut_anywhere_between_its_tokens_is_whole_again(name: str, text: str, data: st.DataObject):
    codec = TRAINED_CODECS[name]
    token_ids = codec.encode(text)
    cut = data.draw(st.integers(0, len(token_ids)))
    pieces = detokenize(codec, [[i] for i in token_ids[cut:]], token_ids[:cut])
    before = text_of_prompt(codec, token_ids[:cut], skip_special_tokens=True)
    assert before + "".join(pieces) == decode(codec, token_ids)


@pytest.mark.parametrize("name", SENTENCEPIECE_KINDS)
def test_a_completion_keeps_the_space_before_its_first_word(name: str):
    codec = TRAINED_CODECS[name]
    prompt = codec.encode("The capital is")
    paris = codec.encode("The capital is Paris")[len(prompt) :]
    assert "".join(detokenize(codec, [[i] for i in paris], prompt)) == " Paris"


@pytest.mark.parametrize("name", ["llama-legacy", "llama-first", "unigram-always"])
def test_a_text_that_stands_alone_begins_without_the_space_that_its_tokenizer_put_there(name: str):
    codec = TRAINED_CODECS[name]
    assert "".join(detokenize(codec, [codec.encode("Paris")])) == "Paris"


@pytest.mark.parametrize(
    ("name", "first_id"), [("byte-level", 0), ("llama", FIRST_BYTE_ID), ("llama-legacy", FIRST_BYTE_ID)]
)
def test_a_character_that_the_prompt_leaves_unfinished_comes_whole(name: str, first_id: int):
    *prompt, last = [first_id + byte for byte in "né日".encode()]
    assert "".join(detokenize(CODECS[name], [[last]], prompt)) == "日"


def test_a_broken_character_in_the_prompt_does_not_change_what_was_read_of_it():
    prompt = [FIRST_BYTE_ID + byte for byte in "é".encode()]
    assert detokenize(CODECS["llama"], [[FIRST_BYTE_ID + 0xFF], [FIRST_WORD_ID + 2]], prompt)[1] == "\ufffd hello"


def test_a_long_prompt_costs_no_more_than_its_end():
    class Prompt(list[int]):
        num_read = 0

        def __reversed__(self) -> Iterator[int]:
            for token_id in super().__reversed__():
                self.num_read += 1
                yield token_id

    for name in ("llama", "byte-level"):
        prompt = Prompt([40] * 100_000)
        CODECS[name].detokenizers.build(prompt)
        assert 0 < prompt.num_read <= 16


@settings(max_examples=300)
@given(batches=st.lists(st.lists(st.one_of(st.integers(0, 49_200), st.integers(17, 300)), max_size=4), max_size=20))
def test_pieces_of_the_real_tokenizer_join_to_what_decode_gives(smollm2: TextCodec, batches: list[list[int]]):
    assert "".join(detokenize(smollm2, batches)) == decode(smollm2, flat(batches))


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
    pieces = detokenize(CODECS["llama"], [*([FIRST_BYTE_ID + byte] for byte in "日".encode()), [FIRST_WORD_ID + 2]])
    assert pieces == ["", "", "", "日 hello", ""]


@pytest.mark.parametrize("text", ["ကမ္ဘာကြီးပါ" * 20, " a" * 200, "a " * 200])
def test_a_long_byte_run_streams_before_it_ends(text: str):
    prompt = [FIRST_WORD_ID + WORDS.index("a")]
    pieces = detokenize(CODECS["llama"], [[FIRST_BYTE_ID + byte] for byte in text.encode()], prompt)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 64


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character():
    assert detokenize(build_codec(), [list("é".encode()[:1])]) == ["", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("name", ["byte-level", "llama"])
def test_detokenizing_garbage_takes_linear_time(name: str):
    continuation = 0x80 if name == "byte-level" else FIRST_BYTE_ID + 0x80

    def seconds(num_tokens: int) -> float:
        detokenizer = CODECS[name].detokenizers.build()
        start_s = time.thread_time()
        for _ in range(num_tokens):
            detokenizer.push([continuation])
        return time.thread_time() - start_s

    # Linear is 8 times as long, quadratic 64 times.
    assert min(seconds(16_000) for _ in range(3)) < 30 * min(seconds(2_000) for _ in range(3))


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=20)
@given(ids=st.lists(st.lists(any_id, max_size=4), min_size=1, max_size=4))
def test_what_a_detokenizer_keeps_does_not_grow_with_the_text(name: str, ids: list[list[int]]):
    codec = CODECS[name]
    detokenizer = codec.detokenizers.build()
    for _ in range(40):
        for batch in ids:
            detokenizer.push(batch)
            assert detokenizer.num_kept <= 8 + 68 + len(batch)


def test_special_tokens_have_no_text_unless_they_are_shown():
    codec, ids = build_codec(), [ord("a"), END_ID, ord("b")]
    assert "".join(detokenize(codec, [ids])) == "ab"
    assert "".join(detokenize(codec, [ids], skip_special_tokens=False)) == "a<end>b"


def test_the_special_tokens_that_strings_name_are_found():
    factory = CODECS["llama"].detokenizers
    assert factory.special_texts(["x</s>y", "<s"]) == {2: "</s>"}
    assert factory.special_texts(["plain", "/s>"]) == {}


def test_a_decoder_that_would_be_detokenized_wrongly_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with pytest.raises(UnsupportedModelError, match="mixes ByteLevel"):
        DetokenizerFactory(tokenizer.backend_tokenizer)
