"""Which tokens run when: decodes first, then short prompts, and the newest gives way."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.scheduler import Schedule, Scheduler
from deployments.engine.scheduling.sequence import Role, Sequence, Status
from deployments.messages import DrawnToken, GenerateRequest, Placed, Priority, SamplingParams
from tests.engine.insides import blocks_of

BLOCK_SIZE = 4


def build(num_blocks: int = 64, max_num_seqs: int = 8, budget: int = 16, *, prefix_caching: bool = False) -> Scheduler:
    blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=prefix_caching)
    return Scheduler(blocks, EngineLimits(1024, BLOCK_SIZE, num_blocks, max_num_seqs, budget))


def add(
    scheduler: Scheduler,
    request_id: str,
    num_tokens: int,
    remote_threshold: int | None = None,
    priority: Priority = Priority.NORMAL,
) -> Sequence:
    request = GenerateRequest(request_id, tuple(range(num_tokens)), SamplingParams(max_tokens=100), priority)
    new = Sequence(request, Role.LOCAL, 0.0, remote_threshold=remote_threshold)
    scheduler.add(new)
    return new


def execute(schedule: Schedule) -> dict[str, int]:
    """Pretend that the model ran: what was computed per request; each complete run draws token 0."""
    ran = {}
    for item in schedule.scheduled:
        item.sequence.begin(item)
        item.sequence.conclude(item, (DrawnToken(0),) * item.num_draws)
        ran[item.sequence.request_id] = item.num_tokens
    return ran


def step(scheduler: Scheduler) -> dict[str, int]:
    ran = execute(scheduler.schedule())
    scheduler.check_integrity()
    return ran


def test_prompts_of_one_length_share_the_budget_in_the_order_of_arrival() -> None:
    scheduler = build(budget=24)
    for name in "abcd":
        add(scheduler, name, 10)
    assert step(scheduler) == {"a": 10, "b": 10}, "and no part of the third, for which both would wait"
    assert step(scheduler) == {"a": 1, "b": 1, "c": 10, "d": 10}
    assert step(scheduler) == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_a_prompt_that_waits_to_be_handed_over_holds_up_no_other() -> None:
    scheduler = build(budget=16)
    done = Sequence(GenerateRequest("done", tuple(range(5)), SamplingParams(max_tokens=100)), Role.EXPORT, 0.0)
    scheduler.add(done)
    execute(scheduler.schedule())
    add(scheduler, "next", 10)
    assert step(scheduler) == {"next": 10}


def test_a_short_prompt_overtakes_a_long_one_in_the_middle_of_its_chunks() -> None:
    scheduler = build(budget=8)
    add(scheduler, "long", 40)
    assert step(scheduler) == {"long": 8}
    add(scheduler, "short", 5)
    assert step(scheduler) == {"short": 5}, "nor does it wait for a part of the long one"
    assert step(scheduler) == {"short": 1, "long": 7}
    add(scheduler, "beside", 3)
    assert step(scheduler) == {"short": 1, "beside": 3, "long": 4}, "a token waits for whatever is in its step"


def test_prompts_that_end_in_one_step_share_it() -> None:
    scheduler = build(budget=16)
    for number in range(4):
        add(scheduler, f"short-{number}", 5)
    assert step(scheduler) == {"short-0": 5, "short-1": 5, "short-2": 5}


def test_a_prompt_is_overtaken_by_no_more_tokens_than_it_has() -> None:
    scheduler = build(budget=8, max_num_seqs=64, num_blocks=256)
    long = add(scheduler, "long", 40)
    num_overtaking = 0
    while "long" not in step(scheduler):
        num_overtaking += 8
        add(scheduler, f"short-{num_overtaking}", 8)
        if num_overtaking > 200:
            pytest.fail("the long prompt starves")
        for name in [s.request_id for s in scheduler.running if s.is_decoding]:
            scheduler.remove(name)
    assert num_overtaking <= len(long.token_ids) + 8


def test_prompts_of_high_priority_go_first_whatever_their_length() -> None:
    scheduler = build(budget=16)
    add(scheduler, "low", 4, priority=Priority.LOW)
    add(scheduler, "normal", 4)
    add(scheduler, "high", 20, priority=Priority.HIGH)
    assert step(scheduler) == {"high": 16}
    assert step(scheduler) == {"high": 4, "normal": 4, "low": 4}


def test_a_prompt_of_low_priority_does_not_wait_for_ever_either() -> None:
    scheduler = build(budget=8, max_num_seqs=64, num_blocks=256)
    add(scheduler, "low", 24, priority=Priority.LOW)
    for number in range(100):
        add(scheduler, f"high-{number}", 8, priority=Priority.HIGH)
        if "low" in step(scheduler):
            break
        for name in [s.request_id for s in scheduler.running if s.is_decoding]:
            scheduler.remove(name)
    assert 23 <= number <= 25, "overtaken by as many prompts as it has tokens, each of which counts one"


def test_the_newest_of_the_lowest_priority_gives_way() -> None:
    scheduler = build(num_blocks=7)
    add(scheduler, "high", 7, priority=Priority.HIGH)
    step(scheduler)
    low = add(scheduler, "low", 7, priority=Priority.LOW)
    step(scheduler)
    add(scheduler, "normal", 7)
    assert step(scheduler) == {"high": 1, "low": 1, "normal": 7}
    assert step(scheduler) == {"high": 1, "normal": 1}
    assert low.status is Status.WAITING
    assert scheduler.num_preemptions == 1


def test_a_low_priority_never_undoes_what_is_scheduled_before_it() -> None:
    scheduler = build(num_blocks=4)
    add(scheduler, "low", 7, priority=Priority.LOW)
    step(scheduler)
    add(scheduler, "high", 7, priority=Priority.HIGH)
    step(scheduler)
    assert step(scheduler) == {"high": 1}, "the low one was first in turn, found no block and gave way itself"


def test_tokens_that_wait_for_a_prefill_engine_are_told_apart() -> None:
    scheduler = build(max_num_seqs=1)
    add(scheduler, "runs", 4)
    step(scheduler)
    add(scheduler, "short", 7, remote_threshold=8)
    add(scheduler, "long", 8, remote_threshold=8)
    assert (scheduler.num_queued_prompt_tokens, scheduler.num_remote_prompt_tokens) == (15, 8)


def test_a_sequence_that_gave_its_seat_back_counts_as_finished() -> None:
    scheduler = build(max_num_seqs=1)
    add(scheduler, "runs", 4)
    step(scheduler)
    add(scheduler, "waits", 4)
    scheduler.remove("waits")
    assert scheduler.num_finished == 0
    scheduler.remove("runs")
    assert scheduler.num_finished == 1


def test_running_decodes_get_their_token_before_any_prompt() -> None:
    scheduler = build(budget=4, max_num_seqs=4)
    for name in "abc":
        add(scheduler, name, 1)
    assert step(scheduler) == {"a": 1, "b": 1, "c": 1}
    add(scheduler, "long", 40)
    for _ in range(10):
        ran = step(scheduler)
        assert ran == {"a": 1, "b": 1, "c": 1, "long": 1}


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = build(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, 2)
    assert set(step(scheduler)) == {"a", "b"}
    scheduler.remove("a")
    assert set(step(scheduler)) == {"b", "c"}


def test_reserved_sequences_take_a_seat_too() -> None:
    scheduler = build(max_num_seqs=2)
    add(scheduler, "r", 9, remote_threshold=0)
    assert step(scheduler) == {}
    for name in "ab":
        add(scheduler, name, 2)
    assert set(step(scheduler)) == {"a"}
    assert len(scheduler.reserved) == 1


def test_the_newest_sequence_gives_way_and_comes_back_first() -> None:
    scheduler = build(num_blocks=4)
    old, young = add(scheduler, "old", 7), add(scheduler, "young", 7)
    assert step(scheduler) == {"old": 7, "young": 7}
    add(scheduler, "later", 3)
    assert step(scheduler) == {"old": 1, "young": 1}
    assert step(scheduler) == {"old": 1}, "only one of them can have a third block"
    assert young.status is Status.WAITING and not young.block_table
    assert [s.request_id for s in scheduler.waiting] == ["young", "later"]
    assert scheduler.num_preemptions == 1
    scheduler.remove("old")
    assert step(scheduler) == {"young": 9, "later": 3}, "its generated tokens are computed again"
    assert len(old.block_table) == 0


def test_a_prompt_in_the_middle_of_its_chunks_gives_way_to_an_older_decode() -> None:
    scheduler = build(num_blocks=6, budget=8)
    add(scheduler, "old", 3)
    step(scheduler)
    prompt = add(scheduler, "prompt", 20)  # takes the other 5 blocks
    assert step(scheduler) == {"old": 1, "prompt": 7}
    assert step(scheduler) == {"old": 1}
    assert prompt.status is Status.WAITING and prompt.num_computed_tokens == 0


def test_a_sequence_that_needs_the_whole_pool_is_not_locked_out_by_the_watermark() -> None:
    scheduler = build(num_blocks=200, budget=1000)
    add(scheduler, "all", 200 * BLOCK_SIZE - 1)
    assert step(scheduler) == {"all": 799}


def test_the_watermark_stays_free_beside_others() -> None:
    scheduler = build(num_blocks=200, budget=1000)
    add(scheduler, "small", 2)
    add(scheduler, "rest", 199 * BLOCK_SIZE)
    assert step(scheduler) == {"small": 2}
    scheduler.remove("rest")
    add(scheduler, "fits", 197 * BLOCK_SIZE)
    assert step(scheduler) == {"small": 1, "fits": 788}


def test_a_long_prompt_is_left_to_a_prefill_engine_and_a_short_one_is_not() -> None:
    scheduler = build()
    short, long = add(scheduler, "short", 7, remote_threshold=8), add(scheduler, "long", 8, remote_threshold=8)
    schedule = scheduler.schedule()
    assert schedule.placed == [Placed("short", False, 0), Placed("long", True, 0)]
    assert [item.sequence for item in schedule.scheduled] == [short]
    assert long.status is Status.RESERVED and len(long.block_table) == 2


def test_cached_tokens_do_not_count_towards_the_threshold() -> None:
    scheduler = build(prefix_caching=True)
    first = add(scheduler, "first", 12)
    step(scheduler)
    blocks_of(scheduler).publish(first)
    scheduler.remove("first")
    add(scheduler, "again", 12, remote_threshold=5)
    assert scheduler.schedule().placed == [Placed("again", False, 8)]
    add(scheduler, "longer", 14, remote_threshold=2)
    assert scheduler.schedule().placed == [Placed("longer", True, 12)]


def test_remote_prompts_are_placed_even_when_the_budget_is_spent() -> None:
    scheduler = build(budget=8)
    add(scheduler, "local", 30)
    add(scheduler, "remote", 30, remote_threshold=1)
    assert step(scheduler) == {"local": 8}
    assert "remote" in scheduler.reserved


def test_there_is_no_work_while_the_only_ones_waiting_cannot_be_admitted() -> None:
    scheduler = build(num_blocks=4)
    add(scheduler, "reserved", 15, remote_threshold=0)
    step(scheduler)
    add(scheduler, "waits", 3)
    step(scheduler)
    assert not scheduler.has_work, "a loop that stepped now would spin until the other engine sends something"
    scheduler.remove("reserved")
    assert scheduler.has_work
    assert step(scheduler) == {"waits": 3}


def test_a_sequence_is_placed_once_however_often_it_is_preempted() -> None:
    scheduler = build(num_blocks=4)
    add(scheduler, "old", 7)
    add(scheduler, "young", 7)
    placed = []
    for _ in range(6):
        schedule = scheduler.schedule()
        placed += [p.request_id for p in schedule.placed]
        execute(schedule)
    scheduler.remove("old")
    placed += [p.request_id for p in scheduler.schedule().placed]
    assert placed == ["old", "young"]


def test_a_sequence_that_is_held_is_left_out_and_holds_nobody_up() -> None:
    scheduler = build(budget=8)
    decoding, prompt = add(scheduler, "decoding", 3), add(scheduler, "prompt", 30)
    assert step(scheduler) == {"decoding": 3}
    assert step(scheduler) == {"decoding": 1, "prompt": 7}
    decoding.hold()
    assert step(scheduler) == {"prompt": 8}
    prompt.hold()
    assert not scheduler.has_work, "a loop that stepped now would spin until the host is ready"
    add(scheduler, "other", 6)
    assert scheduler.has_work
    assert step(scheduler) == {"other": 6}
    scheduler.remove("other")
    decoding.release()
    assert step(scheduler) == {"decoding": 1}
    prompt.release()
    assert step(scheduler) == {"decoding": 1, "prompt": 7}


@pytest.mark.parametrize("status", [Status.WAITING, Status.RESERVED, Status.RUNNING])
def test_removal_frees_the_blocks_in_every_state(status: Status) -> None:
    scheduler = build(num_blocks=8)
    chosen = add(scheduler, "r", 9, remote_threshold=0 if status is Status.RESERVED else None)
    if status is not Status.WAITING:
        step(scheduler)
    assert chosen.status is status
    assert scheduler.remove("r") is chosen
    assert scheduler.remove("r") is None
    scheduler.check_integrity()
    assert blocks_of(scheduler).num_free_blocks == 8
    assert scheduler.num_sequences == 0 and not scheduler.has_work


# The second is preempted, and resumed with all but its last token in the cache.
@example(lengths=[19, 2], outputs=20, num_blocks=15, budget=8, arrivals=1, priorities=[Priority.NORMAL] * 12)
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    outputs=st.integers(1, 20),
    num_blocks=st.integers(15, 40),
    budget=st.integers(8, 30),
    arrivals=st.integers(1, 4),
    priorities=st.lists(st.sampled_from(Priority), min_size=12, max_size=12),
)
def test_everything_finishes_and_no_decode_ever_waits(
    lengths: list[int], outputs: int, num_blocks: int, budget: int, arrivals: int, priorities: list[Priority]
) -> None:
    scheduler = build(num_blocks=num_blocks, budget=budget, prefix_caching=True)
    todo = list(enumerate(lengths))
    for _ in range(5000):
        for i, length in todo[:arrivals]:
            add(scheduler, f"r{i}", length, priority=priorities[i])
        del todo[:arrivals]
        decoding = [s for s in scheduler.running if s.is_decoding]
        schedule = scheduler.schedule()
        ran = {item.sequence.request_id: item.num_tokens for item in schedule.scheduled}
        assert sum(ran.values()) <= budget
        assert ran or not scheduler.has_work
        for chosen in decoding:
            assert ran.get(chosen.request_id) == 1 or chosen.status is Status.WAITING, f"{chosen} got no token"
        execute(schedule)
        for item in schedule.scheduled:
            blocks_of(scheduler).publish(item.sequence)
            if item.sequence.num_generated_tokens >= outputs:
                scheduler.remove(item.sequence.request_id)
        scheduler.check_integrity()
        if not todo and not scheduler.num_sequences:
            break
    assert scheduler.num_sequences == 0, "not all finished"
    assert blocks_of(scheduler).num_free_blocks == num_blocks
