"""The three public forms of traces, and the command that converts and cuts them."""

import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from load_tests.convert import (
    clip,
    convert_azure,
    convert_burstgpt,
    convert_mooncake,
    main,
    recognise,
    share_seen_before,
    window,
)
from load_tests.trace import PREFIX_BLOCK_TOKENS, TraceError, TraceRow, read_trace
from tests.load_tests.traces import HEADER, traces

MOONCAKE = (
    '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 49, 50, 51, 52, 53, 54, '
    "55, 56, 57, 2353, 2354]}\n"
    '{"timestamp": 27000, "input_length": 28, "output_length": 445, "hash_ids": [298]}\n'
)
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,API log
120,GPT-4,0,0,0,API log
"""
# The releases with sessions have more columns, in the middle; calls of the API have no session.
BURSTGPT_SESSIONS = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
7.5,0f31,4.2,ChatGPT,472,18,490,Conversation log
9.0,,1.7,GPT-4,417,276,693,API log
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0319600,110,27
2023-11-16 18:17:03.9799600,4808,10
"""
AZURE_WITH_OFFSET = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 01:00:01+01:00,2399,6
"""
SAMPLES = {"mooncake": MOONCAKE, "burstgpt": BURSTGPT, "azure": AZURE}
CONVERTERS = {"mooncake": convert_mooncake, "burstgpt": convert_burstgpt, "azure": convert_azure}


@pytest.mark.parametrize("read", [read_trace, recognise, *CONVERTERS.values()])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, read):
    with pytest.raises(TraceError, match=r"no-such\.csv: cannot be read"):
        read(tmp_path / "no-such.csv")
    (tmp_path / "packed.csv").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(TraceError, match=r"packed\.csv: cannot be read"):
        read(tmp_path / "packed.csv")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (HEADER, "ours"),
        (MOONCAKE, "mooncake"),
        (BURSTGPT, "burstgpt"),
        (BURSTGPT_SESSIONS, "burstgpt"),
        (AZURE, "azure"),
        (AZURE.replace("\n", "\r\n"), "azure"),
        ("\ufeff" + AZURE, "azure"),
    ],
)
def test_a_form_is_recognised_from_the_content(file, text, form):
    assert recognise(file(text, "no-hint")) == form


@pytest.mark.parametrize(
    "text",
    [
        "",
        "time,tokens\n0,1\n",
        "[1, 2]\n",
        # Qwen's, in seconds and blocks of 16 tokens: alike, and yet another form.
        '{"chat_id": 1, "timestamp": 61.1, "input_length": 28, "output_length": 4, "turn": 1, "hash_ids": [1, 2]}\n',
        # Azure's multimodal one: its images cannot be replayed.
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:01.1,2,4000,5\n",
    ],
)
def test_an_unknown_form_is_refused_with_those_that_are_understood(file, text):
    with pytest.raises(TraceError, match=r"trace\.csv: begins with .*understood") as refusal:
        recognise(file(text))
    assert all(form in str(refusal.value) for form in ("ours", "mooncake", "burstgpt", "azure"))


def test_mooncake_milliseconds_and_hash_ids_become_seconds_and_prefix_ids(file):
    converted = convert_mooncake(file(MOONCAKE))
    assert converted.rows == [
        TraceRow(0.0, 28, 445, (298,)),
        TraceRow(0.482, 6955, 52, (*range(46, 58), 2353, 2354)),
    ]
    assert converted.num_skipped == 0


def test_burstgpt_rows_without_prompt_or_answer_are_skipped_and_counted(file):
    converted = convert_burstgpt(file(BURSTGPT))
    assert converted.rows == [TraceRow(0.0, 472, 18, ()), TraceRow(40.0, 1087, 230, ())]
    assert converted.num_skipped == 2


def test_burstgpt_with_sessions_is_read_by_the_names_of_its_columns(file):
    rows = convert_burstgpt(file(BURSTGPT_SESSIONS)).rows
    assert rows == [TraceRow(0.0, 472, 18, ()), TraceRow(1.5, 417, 276, ())]


def test_azure_instants_become_seconds_from_the_first(file):
    assert convert_azure(file(AZURE)).rows == [TraceRow(0.0, 4808, 10, ()), TraceRow(0.052, 110, 27, ())]


def test_azure_instants_may_have_an_offset_and_no_fraction(file):
    rows = convert_azure(file(AZURE_WITH_OFFSET)).rows
    assert rows == [TraceRow(0.0, 2162, 5, ()), TraceRow(0.99007, 2399, 6, ())]


@pytest.mark.parametrize(
    ("form", "old", "new", "says"),
    [
        ("mooncake", "27482", '"late"', ":1: timestamp: 'late' is not a finite number of at least 0"),
        ("mooncake", "27000", "NaN", ":2: timestamp: nan is not a finite number of at least 0"),
        ("mooncake", "6955", "true", ":1: input_length: True is not a whole number of at least 0"),
        ("mooncake", "6955", "512", ":1: hash_ids: 14 blocks; 512 prompt tokens are 1 of 512 at most"),
        ("mooncake", "[298]", "298", ":2: hash_ids: 298 is not a list of whole numbers"),
        ("mooncake", "[298]", "[null]", ":2: hash_ids: None is not a whole number"),
        ("mooncake", "[298]}", "", ':2: \'{"timestamp": 27000'),
        (
            "mooncake",
            ', "output_length": 445',
            "",
            "is not JSON with the fields timestamp, input_length, output_length",
        ),
        ("burstgpt", "45,ChatGPT", "x,ChatGPT", ":3: Timestamp: 'x' is not a finite number of at least 0"),
        ("burstgpt", "1087", "-1", ":3: Request tokens: '-1' is not a whole number of at least 0"),
        ("burstgpt", ",API log", "", ":4: not as many cells as the header, which has 6"),
        ("azure", "2023-11-16 18:17:03.9799600", "18:17", ":3: TIMESTAMP: '18:17' is not an instant such as 2023"),
        ("azure", "27", "", ":2: GeneratedTokens: '' is not a whole number of at least 0"),
    ],
)
def test_a_wrong_row_of_a_public_trace_is_refused_with_its_place_value_and_bound(file, form, old, new, says):
    with pytest.raises(TraceError) as refusal:
        CONVERTERS[form](file(SAMPLES[form].replace(old, new)))
    assert says in str(refusal.value)


@pytest.mark.parametrize("form", ["burstgpt", "azure"])
def test_a_public_trace_without_a_usable_row_is_refused(file, form):
    header = SAMPLES[form].partition("\n")[0]
    with pytest.raises(TraceError, match=r"trace\.csv: none of its 0 rows has both a prompt and an answer"):
        CONVERTERS[form](file(header + "\n"))


def test_a_window_holds_its_start_but_not_its_end_and_begins_at_zero():
    rows = [TraceRow(float(second), 10, 5, ()) for second in range(10)]
    assert [row.arrival_s for row in window(rows, start_s=2.0, duration_s=3.0)] == [0.0, 1.0, 2.0]
    assert window(rows, start_s=10.0, duration_s=math.inf) == []


@given(rows=traces(), start_s=st.floats(0, 1e6), speed=st.floats(0.01, 100))
def test_a_window_is_in_order_from_zero_and_as_fast_as_asked(rows, start_s, speed):
    kept = [row for row in rows if row.arrival_s >= start_s]
    cut = window(rows, start_s, math.inf, speed)
    assert [row.arrival_s for row in cut] == sorted(row.arrival_s for row in cut)
    assert [row.prompt_tokens for row in cut] == [row.prompt_tokens for row in kept]
    if cut:
        assert cut[0].arrival_s == 0.0
        assert cut[-1].arrival_s == pytest.approx((kept[-1].arrival_s - kept[0].arrival_s) / speed, abs=1e-6)


@given(rows=traces(), max_prompt=st.none() | st.integers(1, 4000), max_output=st.none() | st.integers(1, 4000))
def test_clipped_rows_keep_the_bounds_and_no_block_beyond_their_prompt(rows, max_prompt, max_output):
    for row in rows:
        clipped = clip(row, max_prompt, max_output)
        assert clipped.prompt_tokens == min(row.prompt_tokens, max_prompt or math.inf)
        assert clipped.output_tokens == min(row.output_tokens, max_output or math.inf)
        assert len(clipped.prefix_ids) == min(len(row.prefix_ids), math.ceil(clipped.prompt_tokens / 512))
        assert row.prefix_ids[: len(clipped.prefix_ids)] == clipped.prefix_ids


@given(rows=traces())
def test_the_share_seen_before_is_that_of_the_longest_common_beginning(rows):
    def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    num_seen = sum(
        min(
            PREFIX_BLOCK_TOKENS * max((common(row.prefix_ids, before.prefix_ids) for before in rows[:i]), default=0),
            row.prompt_tokens,
        )
        for i, row in enumerate(rows)
    )
    assert share_seen_before(rows) == pytest.approx(num_seen / sum(row.prompt_tokens for row in rows))


def test_the_command_converts_cuts_and_describes(file, tmp_path, capsys):
    lines = [
        {"timestamp": 1000 * i, "input_length": 2048, "output_length": 10 + i, "hash_ids": [0, 1, 2, 10 + i]}
        for i in range(10)
    ]
    source = file("".join(json.dumps(line) + "\n" for line in lines), "trace.jsonl")
    output = tmp_path / "out.csv"
    cut = ["--start-s=2", "--duration-s=5", "--speed=2", "--max-prompt-tokens=1000", "--max-output-tokens=15"]
    assert main([str(source), str(output), *cut]) == 0
    assert read_trace(output) == [TraceRow(i / 2, 1000, min(12 + i, 15), (0, 1)) for i in range(5)]
    assert capsys.readouterr().out.splitlines() == [
        "5 rows in 2.000 s: 2.500 requests/s",
        "prompt tokens: p50 1000, p99 1000",
        "output tokens: p50 14, p99 15",
        "80.0% of the prompt tokens are in prefix blocks seen before",
        "0 rows of the input skipped (no prompt or no answer), 5 clipped",
    ]


@pytest.mark.parametrize("form", SAMPLES)
def test_the_command_takes_every_form_and_its_own_output(file, tmp_path, capsys, form):
    once, twice = tmp_path / "once.csv", tmp_path / "twice.csv"
    assert main([str(file(SAMPLES[form], "public")), str(once)]) == 0
    assert f"{2 if form == 'burstgpt' else 0} rows of the input skipped" in capsys.readouterr().out
    assert read_trace(once) == CONVERTERS[form](tmp_path / "public").rows
    assert main([str(once), str(twice)]) == 0
    assert twice.read_bytes() == once.read_bytes()


def test_the_command_describes_a_single_request(file, tmp_path, capsys):
    assert main([str(file(HEADER + "3.0,10,5,\n")), str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out.startswith("1 rows in 0.000 s: all at once\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--start-s", "-1"], "--start-s: -1.0 is not from 0 to 1e+12"),
        (["--start-s", "nan"], "--start-s: nan is not from 0 to 1e+12"),
        (["--duration-s", "0"], "--duration-s: 0.0 is not from 1e-06 to inf"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens: 0 is not from 1 to inf"),
        (["--max-output-tokens", "-3"], "--max-output-tokens: -3 is not from 1 to inf"),
        (["--speed", "0"], "--speed: 0.0 is not from 1e-06 to 1e+06"),
        (["--start-s", "41"], "no row in that window; arrivals are from 0 to 40 s"),
    ],
)
def test_the_command_refuses_wrong_options_and_writes_nothing(file, tmp_path, capsys, options, says):
    output = tmp_path / "out.csv"
    assert main([str(file(BURSTGPT)), str(output), *options]) == 1
    printed = capsys.readouterr()
    assert says in printed.err and not printed.out and not output.exists()


def test_the_command_says_why_it_cannot_read_or_write(file, tmp_path, capsys):
    output = tmp_path / "no-such-folder" / "out.csv"
    assert main([str(file("a,b\n")), str(output)]) == 1
    assert "no known form of trace" in capsys.readouterr().err
    assert main([str(file(BURSTGPT)), str(output)]) == 1
    assert "no-such-folder" in capsys.readouterr().err


def test_help_names_every_option_and_form(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    words = capsys.readouterr().out
    options = ("--start-s", "--duration-s", "--max-prompt-tokens", "--max-output-tokens", "--speed")
    assert all(word in words for word in (*options, "ours", "mooncake", "burstgpt", "azure"))
