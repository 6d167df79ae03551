"""What each engine says was cached of a prompt: leading tokens that none has computed for this request."""

from dataclasses import replace

import pytest

from deployments.engine.engine import Engine
from deployments.messages import Placed, TokenOutput, resumed_id
from tests.engine.driving import BLOCK_SIZE, Transcript, build_engine, generate, greedy, prefill_all, run
from tests.engine.families import load, random_prompt, reference

PROMPT = random_prompt(57, seed=57)
ALL = 56  # but for the last token, which is always computed


def build(num_blocks: int = 128) -> Engine:
    return build_engine(load("llama"), max_num_batched_tokens=16, num_blocks=num_blocks)


def say(engine: Engine, request_id: str) -> int:
    """What a request that the engine computes alone is told, with its last token."""
    engine.add(greedy(request_id, PROMPT, 2))
    return run(engine).cached[request_id]


def hand_over_noted(
    prefill: Engine, decode: Engine, request_id: str, num_chunks: int | None = None
) -> tuple[Transcript, int]:
    """Hand a prompt over, or only its first chunks; what the decode engine says, and how many blocks it was sent."""
    decode.add(greedy(request_id, PROMPT, 3), remote_threshold=0)
    (placed,) = decode.step()
    assert isinstance(placed, Placed) and placed.remote
    transcript = Transcript()
    chunks = prefill_all(prefill, greedy(request_id, PROMPT, 3), placed.num_cached_tokens // BLOCK_SIZE)[:num_chunks]
    for chunk, tensor in chunks:
        transcript.note(decode.import_chunk(chunk, tensor))
    if num_chunks is not None:
        decode.prefill_locally(request_id)
    run(decode, transcript)
    return transcript, sum(chunk.num_blocks for chunk, _ in chunks)


def hand_over(prefill: Engine, decode: Engine, request_id: str = "r", num_chunks: int | None = None) -> int | None:
    """`hand_over_noted`; what the decode engine says was cached, with its first token."""
    return hand_over_noted(prefill, decode, request_id, num_chunks)[0].cached[request_id]


def test_an_engine_alone_tells_what_it_found() -> None:
    engine = build()
    assert say(engine, "new") == 0
    assert say(engine, "again") == ALL


def test_requests_of_another_salt_find_nothing() -> None:
    engine = build()

    def num_found(request_id: str, salt: str) -> int:
        engine.add(replace(greedy(request_id, PROMPT, 2), cache_salt=salt))
        return run(engine).cached[request_id]

    assert [num_found("ours", "a"), num_found("theirs", "b"), num_found("nobody's", "")] == [0, 0, 0]
    assert num_found("ours again", "a") == ALL


def test_after_a_hand_off_it_is_what_the_prefill_engine_found_whatever_decode_has() -> None:
    prefill, decode = build(), build()
    generate(decode, [greedy("earlier", PROMPT[:30], 1)])
    assert hand_over(prefill, decode, "decode has a part") == 0, "prefill computed it all"
    assert hand_over(prefill, build(), "prefill has it all") == ALL
    generate(shorter := build(), [greedy("earlier", PROMPT[:20], 1)])
    generate(longer := build(), [greedy("earlier", PROMPT[:30], 1)])
    assert hand_over(shorter, longer, "both have a part") == 16, "prefill began behind the part that it has"
    assert longer.stats().delta_hit_tokens == 0, "decode had as much"


@pytest.mark.parametrize("in_decode", [0, 3], ids=["decode cold", "decode warm"])
@pytest.mark.parametrize("in_prefill", [0, 5], ids=["prefill cold", "prefill warm"])
def test_tokens_are_the_same_whatever_either_engine_has_cached_and_decode_is_sent_what_it_lacks(
    in_prefill: int, in_decode: int
) -> None:
    prefill, decode = build(), build()
    for engine, num_blocks in ((prefill, in_prefill), (decode, in_decode)):
        if num_blocks:
            generate(engine, [greedy("earlier", PROMPT[: num_blocks * BLOCK_SIZE + 1], 1)])
    computed = prefill.stats().prompt_tokens
    transcript, num_sent = hand_over_noted(prefill, decode, "r")
    assert tuple(transcript.tokens["r"]) == reference("llama", PROMPT, 3)
    assert num_sent == -(-len(PROMPT) // BLOCK_SIZE) - in_decode
    assert prefill.stats().prompt_tokens - computed == len(PROMPT) - in_prefill * BLOCK_SIZE


def test_what_prefill_has_and_decode_has_not_is_counted_as_such() -> None:
    generate(prefill := build(), [greedy("earlier", PROMPT[:30], 1)])
    generate(decode := build(), [greedy("earlier", PROMPT[:10], 1)])
    hand_over(prefill, decode)
    assert (decode.stats().prefix_hit_tokens, decode.stats().delta_hit_tokens) == (8, 16)


def test_what_arrived_of_a_broken_hand_off_and_was_found_by_prefill_is_cached_and_the_rest_is_not() -> None:
    prefill = build()
    generate(prefill, [greedy("earlier", PROMPT[:30], 1)])
    assert hand_over(prefill, build(), num_chunks=2) == 24, "found by one engine, computed by none"
    assert hand_over(build(), build(), num_chunks=2) == 0, "computed by one and not by the other"
    assert hand_over(prefill, build(), "r", num_chunks=0) == 0


def test_what_was_computed_for_the_same_request_before_is_not_cached_for_it() -> None:
    engine = build()
    generate(engine, [greedy("earlier", PROMPT[:30], 1)])
    assert say(engine, "r") == 24
    assert say(engine, resumed_id("r", 1)) == 24
    assert say(engine, "another") == ALL


def test_a_preempted_prompt_is_cached_as_far_as_it_need_not_be_computed_again() -> None:
    engine = build(num_blocks=16)
    generate(engine, [greedy("earlier", PROMPT[:30], 1)])
    for name, seed in (("old", 1), ("r", 57)):
        engine.add(greedy(name, random_prompt(57, seed=seed), 40))
    said: list[int] = []
    while engine.has_work:
        outputs = [event for event in engine.step() if isinstance(event, TokenOutput)]
        said += [output.num_cached_tokens for output in outputs if output.request_id == "r"]
        engine.check_integrity()
    assert engine.stats().preemptions > 0
    assert said[0] == 24 and min(said) == said[-1] <= 24
