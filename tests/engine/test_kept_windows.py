"""KV behind windows is given back, be it of all layers or of some: more and longer sequences fit, no token changes."""

from dataclasses import dataclass
from typing import Any

import pytest

from deployments.engine.engine import Engine
from deployments.engine.model.load import prepare_model
from deployments.engine.scheduling.block_hash import hash_chain, root_of
from deployments.engine.scheduling.retention import Retention
from deployments.errors import RequestTooLargeError
from deployments.kv_groups import BLOCK_AXIS
from tests.engine.drafters import mixture, with_drafter
from tests.engine.driving import BLOCK_SIZE, FakeClock, Transcript, build_engine, generate, greedy, prefill_all, run
from tests.engine.families import CPU, WINDOW, load, random_prompt, reference, small_model

NUM_TOKENS = 40
LONG = random_prompt(200, seed=200)
# Blocks of so many tokens, and of a window, in one group of layers.
WHOLE, SEEN = (len(LONG) + NUM_TOKENS) // BLOCK_SIZE, WINDOW // BLOCK_SIZE + 1
# Windows in every layer; in one of two; in two of three, that take turns, so in two groups; in two of three whose group
# has room for one more.
FAMILIES = ("mistral_windowed", "gpt_oss", "gemma2", "gemma3_loose")

each_way = pytest.mark.parametrize("is_pipelined", [False, True], ids=["in order", "pipelined"])


@dataclass(frozen=True)
class Kept:
    """A family, and what its sequences need.

    Attributes:
        family: of models.
        num_full: groups of layers that keep all KV.
        num_windowed: groups with a window.
    """

    family: str
    num_full: int
    num_windowed: int

    @property
    def num_groups(self) -> int:
        return self.num_full + self.num_windowed

    def least(self, num_blocks: int = WHOLE) -> int:
        """Blocks that a sequence of so many in one group needs at least."""
        return self.num_full * num_blocks + self.num_windowed * min(num_blocks, SEEN)

    def build(self, *, is_pipelined: bool = False, **overrides: Any) -> Engine:
        settings = {"max_num_batched_tokens": 16} | overrides
        return build_engine(load(self.family), is_pipelined=is_pipelined, **settings)

    def expected(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return reference(self.family, prompt, NUM_TOKENS)


@pytest.fixture(params=FAMILIES)
def kept(request: pytest.FixtureRequest) -> Kept:
    windows = load(request.param).kv_shape.windows
    return Kept(request.param, windows.count(None), len(windows) - windows.count(None))


def outputs(engine: Engine, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return generate(engine, [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)])


def most_held(engine: Engine, request_id: str, expected: tuple[int, ...]) -> int:
    """Run to the end; blocks that were held at most between two steps."""
    most, transcript = 0, Transcript()
    while engine.has_work:
        transcript.note(engine.step())
        engine.check_integrity()
        most = max(most, engine.limits.num_blocks - engine.num_free_blocks)
    assert transcript.finished == {request_id}
    assert tuple(transcript.tokens[request_id]) == expected
    return most


@each_way
def test_a_sequence_of_many_times_the_window_runs_in_what_it_needs(kept: Kept, is_pipelined: bool) -> None:
    engine = kept.build(is_pipelined=is_pipelined, num_blocks=kept.least())
    assert outputs(engine, [LONG]) == [kept.expected(LONG)]


def test_a_sequence_holds_its_window_and_a_step(kept: Kept) -> None:
    engine = kept.build()
    engine.add(greedy("r", LONG, NUM_TOKENS))
    most = most_held(engine, "r", kept.expected(LONG))
    assert most <= kept.least() + kept.num_windowed * 16 // BLOCK_SIZE < kept.num_groups * WHOLE * 2 // 3


@each_way
def test_as_many_sequences_run_at_once_as_windows_fit(kept: Kept, is_pipelined: bool) -> None:
    prompts = [random_prompt(120, seed=seed) for seed in range(4)]
    num_blocks = 4 * (kept.least(20) + 2 * kept.num_windowed) + 2
    engine = kept.build(is_pipelined=is_pipelined, num_blocks=num_blocks)
    assert outputs(engine, prompts) == [kept.expected(prompt) for prompt in prompts]
    assert engine.stats().preemptions == 0 and num_blocks < 4 * 20 * kept.num_groups


def test_too_small_a_pool_refuses_with_the_numbers(kept: Kept) -> None:
    least = kept.least()
    with pytest.raises(RequestTooLargeError, match=f"need {least} KV blocks, this engine has {least - 1}"):
        kept.build(num_blocks=least - 1).add(greedy("r", LONG, NUM_TOKENS))


@each_way
def test_sequences_that_fight_for_blocks_give_the_same_tokens(kept: Kept, is_pipelined: bool) -> None:
    prompts = [random_prompt(length, seed=length) for length in (10, 11, 12, 90, 13)]
    engine = kept.build(is_pipelined=is_pipelined, num_blocks=kept.least(17) + kept.num_windowed * SEEN)
    assert outputs(engine, prompts) == [kept.expected(prompt) for prompt in prompts]
    assert engine.stats().preemptions > 0


@each_way
def test_a_prefix_is_found_where_the_beginning_of_its_windows_is_gone(kept: Kept, is_pipelined: bool) -> None:
    num_blocks = kept.least(WHOLE + 8) + kept.num_windowed * 2  # what came first of the prompt is given up
    engine = kept.build(is_pipelined=is_pipelined, num_blocks=num_blocks)
    assert outputs(engine, [LONG]) == [kept.expected(LONG)]
    chain = hash_chain(root_of(0), LONG + kept.expected(LONG)[:-1], BLOCK_SIZE)
    assert engine.lending.num_cached(chain) < engine.lending.num_usable(chain) == len(chain)
    follow_up = LONG + kept.expected(LONG)[:-1] + random_prompt(9, seed=9)
    assert outputs(engine, [follow_up]) == [kept.expected(follow_up)]
    assert engine.stats().prefix_hit_tokens == (len(LONG) + NUM_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_a_shared_prefix_longer_than_the_window_continues_into_different_prompts(kept: Kept) -> None:
    stem = LONG[:64]
    prompts = [stem + random_prompt(length, seed=length) for length in (1, 30)]
    engine = kept.build()
    assert outputs(engine, [stem]) == [kept.expected(stem)]
    assert outputs(engine, prompts) == [kept.expected(prompt) for prompt in prompts]
    assert engine.stats().prefix_hit_tokens == 64 * 2


@each_way
def test_only_what_is_read_behind_a_prompt_is_handed_over(kept: Kept, is_pipelined: bool) -> None:
    num_blocks = kept.least() + 2 * kept.num_windowed
    prefill, decode = (kept.build(is_pipelined=is_pipelined, num_blocks=size) for size in (num_blocks, kept.least()))
    decode.add(greedy("r", LONG, NUM_TOKENS), remote_threshold=0)
    (placed,) = decode.step()
    num_passed = Retention(BLOCK_SIZE, (WINDOW,), 16).num_passed(len(LONG))
    num_unread = 0 if kept.num_full else num_passed
    assert placed.remote and placed.num_cached_tokens == num_unread * BLOCK_SIZE  # type: ignore[union-attr]
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS), 0)
    num_blocks = len(LONG) // BLOCK_SIZE
    assert sum(chunk.num_blocks for chunk, _ in chunks) == num_blocks - num_unread
    sent = sum(tensor.shape[BLOCK_AXIS] for _, tensor in chunks)
    assert sent == kept.num_full * num_blocks + kept.num_windowed * (num_blocks - num_passed)
    transcript = Transcript()
    for chunk, tensor in chunks:
        transcript.note(decode.import_chunk(chunk, tensor))
    assert tuple(run(decode, transcript).tokens["r"]) == kept.expected(LONG)
    assert decode.stats().prefix_hit_tokens == decode.stats().prompt_tokens == 0
    for engine in (prefill, decode):
        assert engine.num_free_blocks == engine.limits.num_blocks


@pytest.mark.parametrize("first_block", [None, 0], ids=["as it says", "begun before it says"])
def test_a_decode_engine_that_has_the_beginning_is_sent_only_the_rest(kept: Kept, first_block: int | None) -> None:
    prefill, decode = kept.build(), kept.build()
    stem = LONG[:190]
    outputs(decode, [stem])
    decode.add(greedy("r", LONG, NUM_TOKENS), remote_threshold=0)
    (placed,) = decode.step()
    num_found = placed.num_cached_tokens // BLOCK_SIZE  # type: ignore[union-attr]
    assert num_found == len(stem) // BLOCK_SIZE
    transcript, start = Transcript(), num_found if first_block is None else first_block
    for chunk, tensor in prefill_all(prefill, greedy("r", LONG, NUM_TOKENS), start):
        transcript.note(decode.import_chunk(chunk, tensor))
    assert tuple(run(decode, transcript).tokens["r"]) == kept.expected(LONG)
    assert decode.stats().prefix_hit_tokens == num_found * BLOCK_SIZE


@pytest.mark.parametrize("num_arrived", [0, 1])
def test_a_prompt_whose_prefill_engine_died_is_computed_from_its_start(kept: Kept, num_arrived: int) -> None:
    clock = FakeClock()
    prefill, decode = kept.build(), kept.build(clock=clock, num_blocks=kept.least() + 2 * kept.num_windowed)
    decode.add(greedy("r", LONG, NUM_TOKENS), remote_threshold=0)
    decode.step()
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS))
    assert len(chunks) > 1
    for chunk, tensor in chunks[:num_arrived]:
        decode.import_chunk(chunk, tensor)
    clock.now_s += 1000
    assert tuple(run(decode).tokens["r"]) == kept.expected(LONG)
    assert decode.stats().prompt_tokens == len(LONG)


def test_drafts_that_are_taken_back_find_their_window_there(kept: Kept) -> None:
    engine = kept.build(num_blocks=kept.least(WHOLE + 1) + kept.num_windowed, speculation={"method": "ngram"})
    engine = with_drafter(engine, lambda sequence: kept.expected(LONG), mixture)
    assert outputs(engine, [LONG]) == [kept.expected(LONG)]
    assert sum(engine.stats().drafted_tokens.counts)


def test_a_window_that_holds_whatever_the_model_takes_is_none() -> None:
    model = small_model("MistralConfig", sliding_window=1024)
    assert prepare_model(model, "", CPU).kv_shape.windows == (None,)


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ("fw", [(0,), (1,)]),
        ("wwwf", [(3,), (0,), (1,), (2,)]),
        ("fwfwf", [(0, 4), (2,), (1, 3)]),
        ("wwfww", [(2,), (0,), (1,), (3,), (4,)]),
        ("ffwwwww", [(0, 1), (2, 5), (3, 6), (4,)]),
        ("wwwwwfwwwwwfw", [(5, 11), (0, 7), (1, 8), (2, 9), (3, 10), (4, 12), (6,)]),
        ("ffffwww", [tuple(range(7))]),  # a fifth of four, and more, would be empty
        ("fwwwwwwww", [tuple(range(9))]),  # nine tables
    ],
)
def test_layers_are_put_into_groups_of_as_many_each(kinds: str, groups: list[tuple[int, ...]]) -> None:
    layer_types = [{"f": "full_attention", "w": "sliding_attention"}[kind] for kind in kinds]
    changes: dict[str, Any] = {"layer_types": layer_types, "num_hidden_layers": len(kinds), "sliding_window": WINDOW}
    shape = prepare_model(small_model("Gemma3TextConfig", **changes), "", CPU).kv_shape
    assert [group.layers for group in shape.groups] == groups
    num_full = sum(not set(group) & {i for i, kind in enumerate(kinds) if kind == "w"} for group in groups)
    assert shape.windows == (None,) * max(1, num_full) + (WINDOW,) * (len(groups) - max(1, num_full))
