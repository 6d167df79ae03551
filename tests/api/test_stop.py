"""The stop checker against a plain search of the text that grows by one character at a time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api.stop import StopChecker

# Few letters, so that stops overlap, repeat and hide in each other.
text_pieces = st.lists(st.text("abc", max_size=6), max_size=12)
stop_strings = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    checker = StopChecker(stops)
    emitted = []
    for piece in pieces:
        text, is_hit = checker.push(piece)
        emitted.append(text)
        if is_hit:
            return emitted, True
    return [*emitted, checker.flush()], False


def cut_at_first_stop(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@given(stops=stop_strings, pieces=text_pieces)
def test_the_text_ends_before_the_first_completed_stop_however_it_is_cut(stops: list[str], pieces: list[str]):
    emitted, is_hit = run(stops, pieces)
    assert ("".join(emitted), is_hit) == cut_at_first_stop(stops, "".join(pieces))


@given(stops=stop_strings, pieces=text_pieces)
def test_no_more_is_held_back_than_could_begin_a_stop(stops: list[str], pieces: list[str]):
    checker, text = StopChecker(stops), ""
    emitted = ""
    for piece in pieces:
        new, is_hit = checker.push(piece)
        text, emitted = text + piece, emitted + new
        if is_hit:
            return
        beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        held = max((b for b in beginnings if text.endswith(b)), key=len, default="")
        assert emitted == text.removesuffix(held)


# Shown text in small letters; "X" is a special token, which is not shown.
mixed_pieces = st.lists(st.one_of(st.text("ab", max_size=3), st.just("X")), max_size=12)
mixed_stops = st.lists(st.text("abX", min_size=1, max_size=4), min_size=1, max_size=4)


def run_mixed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    checker, emitted = StopChecker(stops, ["X"]), ""
    for piece in pieces:
        text, is_hit = checker.push_hidden(piece) if piece == "X" else checker.push(piece)
        emitted += text
        if is_hit:
            return emitted, True
    return emitted + checker.flush(), False


@given(stops=mixed_stops, pieces=mixed_pieces)
def test_a_stop_that_names_a_special_token_sees_it_and_the_others_do_not(stops: list[str], pieces: list[str]):
    text = "".join(pieces)
    for end in range(1, len(text) + 1):
        seen, shown = text[:end], text[:end].replace("X", "")
        hits = [stop for stop in stops if (seen if "X" in stop else shown).endswith(stop)]
        # Text that is not shown completes no stop string that looks only at what is.
        hits = [stop for stop in hits if "X" in stop or text[end - 1] != "X"]
        if hits:
            longest = max(len(stop.replace("X", "")) for stop in hits)
            assert run_mixed(stops, pieces) == (shown[: len(shown) - longest], True)
            return
    assert run_mixed(stops, pieces) == (text.replace("X", ""), False)


@given(stops=stop_strings, pieces=text_pieces)
def test_a_stop_string_can_be_part_of_the_text(stops: list[str], pieces: list[str]):
    checker, emitted, is_hit = StopChecker(stops, include_stop=True), "", False
    for piece in pieces:
        text, is_hit = checker.push(piece)
        emitted += text
        if is_hit:
            break
    whole = "".join(pieces)
    end = min((whole.find(stop) + len(stop) for stop in stops if stop in whole), default=len(whole))
    assert (emitted if is_hit else emitted + checker.flush()) == whole[:end]


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted"),
    [
        (["END"], ["one E", "N", "D two"], ["one ", "", ""]),
        (["END"], ["one E", "N", "one"], ["one ", "", "ENone"]),
        (["\n\n", "\n"], ["a\n\nb"], ["a"]),
        (["aab"], ["aa", "ab"], ["", "a"]),
        (["é日"], ["é", "日"], ["", ""]),
    ],
)
def test_examples(stops: list[str], pieces: list[str], emitted: list[str]):
    assert [text for text in run(stops, pieces)[0] if text] == [text for text in emitted if text]


def test_a_stop_that_almost_matches_everywhere_takes_linear_time():
    def seconds(num_characters: int) -> float:
        checker = StopChecker(["a" * 1000 + "b"])
        start_s = time.thread_time()
        for _ in range(num_characters // 10):
            checker.push("a" * 10)
        return time.thread_time() - start_s

    assert min(seconds(80_000) for _ in range(3)) < 30 * min(seconds(10_000) for _ in range(3))
