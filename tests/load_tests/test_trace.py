"""Our form of a trace: its refusals, and the small trace that is shipped."""

from itertools import pairwise

import pytest
from hypothesis import given

from load_tests.synthetic_trace import PATH, SEED, synthesize
from load_tests.trace import TraceError, TraceRow, read_trace, write_trace
from tests.load_tests.traces import HEADER, traces


@given(rows=traces())
def test_what_was_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "round-trip.csv"
    write_trace(path, rows)
    assert read_trace(path) == rows


def test_columns_may_come_in_any_order_and_with_others(file):
    path = file("note,prefix_ids,arrival_s,output_tokens,prompt_tokens\nhello,7 8,0.5,3,600\n")
    assert read_trace(path) == [TraceRow(0.5, 600, 3, (7, 8))]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "trace.csv:1: no column arrival_s, prompt_tokens, output_tokens, prefix_ids"),
        ("arrival_s,prompt_tokens,prefix_ids\n0,1,\n", "trace.csv:1: no column output_tokens; needed are arrival_s,"),
        (HEADER, "trace.csv: the trace is empty"),
        (HEADER + "0.0,10,5,\nsoon,10,5,\n", "trace.csv:3: arrival_s: 'soon' is not a finite number of at least 0"),
        (HEADER + "-0.5,10,5,\n", "trace.csv:2: arrival_s: '-0.5' is not a finite number of at least 0"),
        (HEADER + "inf,10,5,\n", "trace.csv:2: arrival_s: 'inf' is not a finite number of at least 0"),
        (HEADER + "nan,10,5,\n", "trace.csv:2: arrival_s: 'nan' is not a finite number of at least 0"),
        (HEADER + "2.0,10,5,\n1.5,10,5,\n", "trace.csv:3: arrival_s: 1.5 is before 2.0 of the row above"),
        (HEADER + "0.0,many,5,\n", "trace.csv:2: prompt_tokens: 'many' is not a whole number of at least 1"),
        (HEADER + "0.0,0,5,\n", "trace.csv:2: prompt_tokens: '0' is not a whole number of at least 1"),
        (HEADER + "0.0,10,0,\n", "trace.csv:2: output_tokens: '0' is not a whole number of at least 1"),
        (HEADER + "0.0,10,2.5,\n", "trace.csv:2: output_tokens: '2.5' is not a whole number of at least 1"),
        (HEADER + "0.0,10,5,a b\n", "trace.csv:2: prefix_ids: 'a' is not a whole number"),
        (HEADER + "0.0,1024,5,1 2 3\n", "trace.csv:2: prefix_ids: 3 blocks; 1024 prompt tokens are 2 of 512 at most"),
        (HEADER + "0.0,1024,5,1,2\n", "trace.csv:2: not as many cells as the header, which has 4"),
        (HEADER + "0.0,1024,5\n", "trace.csv:2: not as many cells as the header, which has 4"),
    ],
)
def test_a_wrong_trace_is_refused_with_its_place_value_and_bound(file, text, says):
    with pytest.raises(TraceError) as refusal:
        read_trace(file(text))
    assert says in str(refusal.value)


def test_the_last_prefix_block_may_be_a_partial_one(file):
    assert read_trace(file(HEADER + "0.0,513,5,1 2\n"))[0].prefix_ids == (1, 2)


def test_the_shipped_trace_is_what_its_generator_makes(tmp_path):
    made = tmp_path / "made.csv"
    write_trace(made, synthesize(SEED))
    assert made.read_bytes() == PATH.read_bytes()


def test_the_synthetic_trace_has_bursts_of_three_kinds_within_a_minute():
    rows = synthesize(SEED)
    shared = [row for row in rows if row.prefix_ids]
    long = [row for row in rows if row.prompt_tokens >= 1200]
    chats = [row for row in rows if row.prompt_tokens <= 120]
    assert (len(chats), len(long), len(shared)) == (26, 8, 6)
    assert all(1044 <= row.prompt_tokens <= 1124 and row.prefix_ids == (0, 1) for row in shared)
    assert rows[0].arrival_s == 0.0 and 50 < rows[-1].arrival_s < 60
    gaps = [after.arrival_s - before.arrival_s for before, after in pairwise(rows)]
    assert sum(gap < 1.0 for gap in gaps) > len(rows) / 2 and max(gaps) > 3.0
