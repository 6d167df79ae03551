"""How many lists and objects a body may hold, and that brackets in texts are none."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api import json_bounds
from deployments.api.json_bounds import MAX_CONTAINERS, check_containers
from deployments.errors import InvalidRequestError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(alphabet='[]{}",:\\\\aé\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='[{"\\\\a'), inner),
)


def num_containers(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(num_containers, value.values()))
    return 1 + sum(map(num_containers, value)) if isinstance(value, list) else 0


def is_taken(data: bytes) -> bool:
    try:
        check_containers(data)
    except InvalidRequestError:
        return False
    return True


@given(VALUES, st.integers(0, 12))
def test_lists_and_objects_count_and_texts_do_not(value: object, bound: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "MAX_CONTAINERS", bound)
        assert is_taken(orjson.dumps(value)) is (num_containers(value) <= bound)


@given(st.text(alphabet='[]{}",:\\\\a'), st.integers(0, 3))
def test_of_what_is_no_json_no_more_is_read_than_was_counted(text: str, bound: int) -> None:
    """A reader stops at the first fault: what it has opened by then is at most what stands outside of strings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "MAX_CONTAINERS", bound)
        if is_taken(text.encode()):
            assert num_opened_by_a_reader(text) <= bound


def num_opened_by_a_reader(text: str) -> int:
    """Lists and objects that begin before the first fault that a reader of single characters can see."""
    num_opened, place = 0, 0
    while place < len(text):
        character = text[place]
        if character in "[{":
            num_opened += 1
        elif character == "\\":
            break
        elif character == '"':
            place += 1
            while place < len(text) and text[place] != '"':
                place += 2 if text[place] == "\\" else 1
        place += 1
    return num_opened


def test_a_text_of_nothing_but_brackets_is_taken() -> None:
    assert is_taken(orjson.dumps({"prompt": '[{"' * 2 * MAX_CONTAINERS}))
    assert not is_taken(orjson.dumps([[]] * MAX_CONTAINERS))
