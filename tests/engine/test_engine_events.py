"""What one engine says and holds, step by step: decodes beside prompts, chunks, aborts, reservations, figures."""

import pytest

from deployments.engine.engine import Engine
from deployments.engine.handoff.outgoing import End
from deployments.engine.scheduling.sequence import Sequence
from deployments.messages import TokenOutput
from tests.engine.driving import Taken, Transcript, generate, greedy, prefill_all, run
from tests.engine.insides import is_between_engines, scheduler_of
from tests.engine.small import POOL_BLOCKS, build_small


def decoding(engine: Engine) -> list[Sequence]:
    return [s for s in scheduler_of(engine).running if s.is_decoding]


def test_running_decodes_get_a_token_in_every_step_of_a_long_prompt() -> None:
    engine = build_small(num_blocks=64, max_model_len=64)
    for i in range(3):
        engine.add(greedy(f"r{i}", (1, 2, i), 40))
    while len(decoding(engine)) < 3:
        engine.step()
    engine.add(greedy("long", [5] * 60, 1))
    num_steps = 0
    while "long" in scheduler_of(engine):
        got = {e.request_id for e in engine.step() if isinstance(e, TokenOutput)}
        assert got >= {"r0", "r1", "r2"}
        num_steps += 1
    assert num_steps == 12, "5 of 8 tokens of each step are left for the prompt"


def test_an_export_waits_for_room_in_the_buffer_and_goes_on_when_chunks_are_released() -> None:
    engine = build_small(max_num_batched_tokens=4)  # chunks of 1 block, a buffer of 4
    engine.prefill(greedy("r", range(30), 2), 0)
    taken = Taken(engine, "r")
    run(engine)
    waiting = taken.chunks
    assert len(taken.words) == len(waiting) == 4
    assert engine.num_sequences == 1, "its blocks stay until they are copied out"
    assert [chunk.first_token for chunk in waiting] == [None] * 4
    assert not engine.has_work, "taken is not released: the receiver still reads it"
    for chunk in waiting:
        taken.handoff.release(chunk.index)
    assert engine.has_work
    run(engine)
    rest = taken.chunks[4:]
    assert [c.is_last for c in rest] == [False, False, False, True]
    assert engine.num_sequences == 0 and engine.num_free_blocks == POOL_BLOCKS


def test_memory_for_chunks_is_set_aside_before_the_step_that_computes_them_and_they_are_told_of_behind_it() -> None:
    engine = build_small()
    engine.prefill(greedy("r", range(6), 2), 0)
    taken = Taken(engine, "r")
    engine.begin_step()
    assert engine.stats().num_exported_blocks == 2 and taken.words == []
    told = [event for event in engine.finish_step() if isinstance(event, TokenOutput)]
    (chunk,) = taken.chunks
    assert chunk.is_last and taken.end is End.WHOLE
    assert chunk.first_token is not None and (chunk.first_token.token_id,) == told[0].token_ids
    assert engine.num_sequences == 0 and engine.num_free_blocks == POOL_BLOCKS


def test_a_first_token_that_ends_the_request_leaves_no_chunk_behind() -> None:
    engine = build_small()
    engine.prefill(greedy("r", range(6), 1), 0)
    taken = Taken(engine, "r")
    engine.step()
    assert taken.end is not None and not is_between_engines(engine)
    assert engine.num_sequences == 0 and engine.num_free_blocks == POOL_BLOCKS


def test_aborting_a_chunked_prefill_returns_every_block_and_chunk() -> None:
    engine = build_small()
    engine.prefill(greedy("r", range(30), 2), 0)
    engine.step()
    assert engine.num_free_blocks < POOL_BLOCKS and engine.stats().num_exported_blocks == 2
    engine.abort("r")
    engine.check_integrity()
    assert engine.num_free_blocks == POOL_BLOCKS and engine.stats().num_exported_blocks == 0
    assert engine.take_handoff("r") is None
    assert not engine.has_work


def test_a_decode_engine_waits_quietly_while_its_pool_is_reserved() -> None:
    prefill, decode = build_small(), build_small(num_blocks=9)
    request = greedy("r", range(30), 6)
    decode.add(request, remote_threshold=0)
    decode.step()
    decode.add(greedy("next", range(20, 30), 3))
    decode.step()
    assert not decode.has_work
    transcript = Transcript()
    for chunk, tensor in prefill_all(prefill, request):
        transcript.note(decode.import_chunk(chunk, tensor))
    assert decode.has_work
    assert run(decode, transcript).finished == {"r", "next"}


def test_a_chunk_of_another_shape_is_refused_and_the_right_one_is_still_taken() -> None:
    prefill, decode = build_small(), build_small()
    request = greedy("r", range(5), 3)
    decode.add(request, remote_threshold=0)
    decode.step()
    ((chunk, tensor),) = prefill_all(prefill, request)
    for wrong in (tensor[:, :, :1], tensor.double()):
        with pytest.raises(ValueError, match="this pool takes"):
            decode.import_chunk(chunk, wrong)
    transcript = Transcript()
    transcript.note(decode.import_chunk(chunk, tensor))
    assert run(decode, transcript).finished == {"r"}


def test_stats_tell_what_those_that_run_have_drawn_and_what_all_may_draw() -> None:
    engine = build_small(num_blocks=64, max_num_seqs=1)
    engine.add(greedy("runs", range(8), 6))
    engine.add(greedy("waits", range(20, 33), 30))
    for _ in range(3):
        engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    assert (stats.num_drawn_tokens, stats.num_allowed_tokens) == (3, 36)


def test_stats_count_what_was_done() -> None:
    engine = build_small(num_blocks=64)
    generate(engine, [greedy("a", range(10), 4), greedy("b", range(20, 33), 2)])
    generate(engine, [greedy("c", range(10), 4)])
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.prefix_hit_tokens, stats.generated_tokens) == (10 + 13 + 2, 8, 4 + 2 + 4)
    assert sum(stats.ttft_s.counts) == 3 and sum(stats.itl_s.counts) == 3 + 1 + 3
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    stats.ttft_s.observe(1.0)
    assert sum(engine.stats().ttft_s.counts) == 3, "a snapshot is a copy"
