"""What the ingress tells the API of the model, put together from its engines and its tokenizer."""

from dataclasses import replace

import pytest

from deployments.api.text import TextCodec
from deployments.engine_info import EngineInfo
from deployments.ingress import describe_served
from tests.api.fakes import END_ID, build_tokenizer

ENGINE = EngineInfo(
    path="some/model",
    max_model_len=4096,
    vocab_size=257,
    eos_token_ids=(),
    block_size=16,
    bytes_per_block=1,
    lease_s=1.0,
    pid=1,
    num_blocks=100,
)


@pytest.mark.parametrize(
    ("configured", "tokenizers_own", "expected"),
    [
        ((7,), "<end>", (7, END_ID)),
        ((7, END_ID), "<end>", (7, END_ID)),
        ((0,), None, (0,)),
        ((), "<end>", (END_ID,)),
        ((7,), "<nowhere>", (7,)),  # which transformers adds to the tokenizer, beyond the model's ids
    ],
)
def test_a_text_ends_where_the_engines_or_the_tokenizer_say(
    configured: tuple[int, ...], tokenizers_own: str | None, expected: tuple[int, ...]
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = tokenizers_own
    tokenizer.add_special_tokens({"eos_token": tokenizers_own} if tokenizers_own else {})
    engine = replace(ENGINE, eos_token_ids=configured)
    assert describe_served(engine, TextCodec(tokenizer), "m").eos_token_ids == expected


@pytest.mark.parametrize(
    ("kv_windows", "num_blocks", "longest"),
    [
        ((None,), 100, 1600),
        ((None,), 300, 4096),
        ((200,), 14, 4096),
        ((200,), 13, 208),
        ((None, 200), 270, 4096),
        ((None, 200), 100, 1376),
        ((None, 200), 20, 160),
    ],
)
def test_the_context_is_no_longer_than_the_pool_holds(
    kv_windows: tuple[int | None, ...], num_blocks: int, longest: int
) -> None:
    engine = replace(ENGINE, kv_windows=kv_windows, num_blocks=num_blocks)
    assert describe_served(engine, TextCodec(build_tokenizer()), "m").max_model_len == longest
