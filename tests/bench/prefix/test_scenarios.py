"""What one cache that forgets nothing has left to compute."""

from load_tests.schedule import Planned
from tests.bench.prefix.scenarios import BLOCK_SIZE, least_computed


def planned(session: str, turn: int, prompt: tuple[int, ...]) -> Planned:
    return Planned("agent", session, turn, 0.0, 0.0, prompt, 8)


def test_a_turn_has_left_what_is_behind_the_whole_blocks_of_the_turn_before() -> None:
    first = tuple(range(3 * BLOCK_SIZE + 5))
    assert least_computed([planned("a", 0, first), planned("a", 1, (*first, *range(40)))]) == len(first) + 5 + 40


def test_the_last_token_is_computed_though_all_blocks_are_known() -> None:
    prompt = tuple(range(2 * BLOCK_SIZE))
    assert least_computed([planned("a", 0, prompt), planned("b", 0, prompt)]) == len(prompt) + BLOCK_SIZE


def test_prompts_that_share_nothing_are_computed_whole() -> None:
    assert least_computed([planned("a", 0, (1,) * 40), planned("b", 0, (2,) * 40)]) == 80
