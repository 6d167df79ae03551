"""A tokenizer of every kind that open models come with, small, built by the tokenizers library."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import Decoder
from transformers import PreTrainedTokenizerFast

from deployments.api.text import TextCodec
from tests.api.fakes import build_codec

TEXTS = [
    "plain words, and 'quotes'.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 at the end 🎉",
    "日本語のテキストと한국어 텍스트",
    "e\u0301 combining, na\u0308ive, नमस्ते, ကမ္ဘာ",
    "  spaces   and\n\nnew\tlines  ",
]
CORPUS = [*TEXTS[:1], "The capital of France is Paris, and the words of others are not the capital.\n", TEXTS[4]]
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
FIRST_BYTE_ID, FIRST_WORD_ID = len(SPECIALS), len(SPECIALS) + len(BYTE_TOKENS)
WORDS = ["▁", "▁▁", "▁hello", "▁wor", "ld", "é", "日", "本", ".", "a", "e", "\u0301", "##ing", "'", "\ufffd"]
NUM_WORD_IDS = FIRST_WORD_ID + len(WORDS)


def llama_decoder() -> Decoder:
    """Of Llama 2, TinyLlama, Mistral and Phi-3."""
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def gemma_decoder() -> Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _wrap(tokenizer: Tokenizer) -> TextCodec:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def build_sentencepiece(decoder: Decoder | None) -> TextCodec:
    """A vocabulary as SentencePiece writes it: special tokens, then all bytes, then pieces; it can encode little."""
    vocab = {token: token_id for token_id, token in enumerate([*SPECIALS, *BYTE_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if decoder is not None:
        tokenizer.decoder = decoder
    return _wrap(tokenizer)


def _train_bpe(
    pre_tokenizer: pre_tokenizers.PreTokenizer, alphabet: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens in order, without special ones, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [(left, right) for left, right in model["merges"]]


def build_llama(*, legacy: bool) -> TextCodec:
    """As Llama 2 and TinyLlama have it (legacy), or Mistral and Phi-3: BPE with byte fallback and a dummy space."""
    tokens, merges = _train_bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), ["▁"])
    vocab = {token: token_id for token_id, token in enumerate([*SPECIALS, *BYTE_TOKENS, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = llama_decoder()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer)


def build_gemma() -> TextCodec:
    """BPE with byte fallback, and no dummy space."""
    tokens, merges = _train_bpe(pre_tokenizers.Metaspace(prepend_scheme="never"), ["▁"])
    vocab = {token: token_id for token_id, token in enumerate([*SPECIALS, *BYTE_TOKENS, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = gemma_decoder()
    return _wrap(tokenizer)


def build_unigram(prepend_scheme: str) -> TextCodec:
    """As T5 and XLNet have it, without byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, special_tokens=SPECIALS, unk_token="<unk>", initial_alphabet=["▁"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


def build_byte_level() -> TextCodec:
    """As GPT-2, Llama 3 and Qwen have it: tokens of several bytes, cut anywhere."""
    tokens, merges = _train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: token_id for token_id, token in enumerate([*SPECIALS, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


# What each decoder makes of one vocabulary.
DECODERS: dict[str, Decoder | None] = {
    "llama": llama_decoder(),
    "gemma": gemma_decoder(),
    "strip-two": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "metaspace": decoders.Metaspace(),
    "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "bpe-suffix": decoders.BPEDecoder("ld"),
    "none": None,
}
DECODER_CODECS = {name: build_sentencepiece(decoder) for name, decoder in DECODERS.items()}
# Tokenizers that were trained, and can encode.
TRAINED_CODECS = {
    "llama-legacy": build_llama(legacy=True),
    "llama-first": build_llama(legacy=False),
    "gemma-trained": build_gemma(),
    "unigram-always": build_unigram("always"),
    "unigram-never": build_unigram("never"),
    "byte-level-trained": build_byte_level(),
}
CODECS = DECODER_CODECS | TRAINED_CODECS | {"byte-level": build_codec()}
