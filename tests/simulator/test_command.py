"""`python -m deployments.simulator`: what is wrong with what it is given it names; what it finds it says in words."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from deployments.simulator.__main__ import main

HEADER = "arrival_s,prompt_tokens,output_tokens,prefix_ids\n"
ROWS = "".join(f"{i / 10},1000,20,\n" for i in range(50))


def theirs(**values: object) -> str:
    row = {"timestamp": 1, "input_length": 600, "output_length": 3, "hash_ids": [1]}
    return json.dumps(row | values)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with which cannot be done."""
    code: object
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("a,b\n1,2\n", [], "trace.csv:1: no column arrival_s, prompt_tokens, output_tokens, prefix_ids"),
        (HEADER, [], "the trace has no request"),
        (HEADER + "0.5,many,3,\n", [], "trace.csv:2: prompt_tokens: 'many' is not a whole number of 1 to 1,000,000"),
        (HEADER + "-1,5,3,\n", [], "trace.csv:2: arrival_s: '-1' is not a number of 0 to 10,000,000"),
        (HEADER + "nan,5,3,\n", [], "trace.csv:2: arrival_s: 'nan' is not a number of 0"),
        (HEADER + "1e300,5,3,\n", [], "trace.csv:2: arrival_s: '1e300' is not a number of 0 to 10,000,000"),
        (HEADER + "1,5,0,\n", [], "trace.csv:2: output_tokens: '0' is not a whole number of 1"),
        (HEADER + "1,5,-3,\n", [], "trace.csv:2: output_tokens: '-3' is not a whole number of 1"),
        (
            HEADER + "1,5,10000000,\n",
            [],
            "trace.csv:2: output_tokens: '10000000' is not a whole number of 1 to 1,000,000",
        ),
        (HEADER + "1,5,1e20,\n", [], "trace.csv:2: output_tokens: '1e20' is not a whole number"),
        (HEADER + "1,600,3,1 -7\n", [], "trace.csv:2: prefix_ids: '-7' is not a whole number of 0 to 2**128 - 1"),
        (
            HEADER + f"1,600,3,{2**128}\n",
            [],
            "trace.csv:2: prefix_ids: '340282366920938463463374607431768211456' is not",
        ),
        (HEADER + "1,600,3,1 2 3\n", [], "trace.csv:2: prefix_ids: 3 blocks; 600 prompt tokens are 2 of 512 at most"),
        (HEADER + "2,5,3,\n1,5,3,\n", [], "trace.csv:3: arrival_s: 1.0 is before 2.0 of the row above; sort rows"),
        (HEADER + "2,5,3\n", [], "trace.csv:2: not as many cells as the header, which has 4"),
        (HEADER + f"1,5,3,{'1' * 140_000}\n", [], "trace.csv:2: field larger than field limit"),
        (HEADER + ROWS, ["--fixed", "3"], "'3' is not P+D"),
        (HEADER + ROWS, ["--fixed"], "--fixed: expected at least one argument"),
        (HEADER + ROWS, ["--fixed", "1+99999999999999999999"], "each is at most 10,000, and D at least 1"),
        (HEADER + ROWS, ["--advise", "95"], "--advise: '95' is not a share"),
        (HEADER + ROWS, ["--max-requests", "0"], "--max-requests: '0' is not a whole number of 1 to 1,000,000,000"),
        (HEADER + ROWS, ["--max-requests", "-3"], "--max-requests: '-3' is not a whole number of 1"),
        (HEADER + ROWS, ["--most", "0"], "--most: '0' is not a whole number of 1 to 10,000"),
        (HEADER + ROWS, ["--most", "-3"], "--most: '-3' is not"),
        (HEADER + ROWS, ["--slower", "0"], "--slower: '0' is not a number of 0.001 to 1e+06"),
        (HEADER + ROWS, ["--slower", "nan"], "--slower: 'nan' is not a number"),
        (HEADER + ROWS, ["--slower", "-1"], "--slower: '-1' is not a number"),
        (HEADER + ROWS, ["--failure-s", "0"], "--failure-s: '0' is not a number of 60 to inf"),
        (HEADER + ROWS, ["--failure-s", "-1"], "--failure-s: '-1' is not"),
        (HEADER + ROWS, ["--ttft-s", "0"], "--ttft-s: '0' is not a number of 0.0001 to 86,400"),
        (HEADER + ROWS, ["--itl-s", "nan"], "--itl-s: 'nan' is not a number of 0.0001 to 86,400"),
        (HEADER + ROWS, ["--start-s", "-1"], "--start-s: '-1' is not a number of 0 to 86,400"),
        (HEADER + ROWS, ["--start-s", "inf"], "--start-s: 'inf' is not"),
        (HEADER + ROWS, ["--cost", "-1"], "--cost: '-1' is not a number of 0 to 1e+09"),
        (HEADER + ROWS, ["--cost", "nan"], "--cost: 'nan' is not"),
        (HEADER + ROWS, ["--tier-tokens", "-1"], "--tier-tokens: '-1' is not a whole number of 0"),
        (HEADER + ROWS, ["--min-remote-tokens", "-1"], "--min-remote-tokens: '-1' is not a whole number of 0"),
        (HEADER + ROWS, ["--least", "5+5", "--most", "2"], "--least: more than --most, which is 2"),
        (HEADER + ROWS, ["--only-fixed"], "--only-fixed: there is nothing to play; name pools with --fixed"),
        (HEADER + ROWS, ["--advise", "0.9", "--fixed", "1+1"], "--fixed: --advise chooses the pools itself"),
        (HEADER + ROWS, ["--json", "/none/r.json"], "--json: '/none/r.json': there is no folder '/none'"),
        (HEADER + ROWS, ["--plot", "/none/r.png"], "--plot: '/none/r.png': there is no folder '/none'"),
        (
            HEADER + ROWS,
            ["--plot", "r.txt"],
            "--plot: 'r.txt' is no image that can be written; its name ends in .png, .svg, .pdf",
        ),
        (HEADER + ROWS, ["--kinds", '{"h": {"step_s": 1}}'], "h: no cost"),
        (HEADER + ROWS, ["--kinds", '{"h": {"cost": 1, "stepp": 1}}'], "no figure 'stepp'; there are step_s, token_s"),
        (HEADER + ROWS, ["--kinds", '{"h": {"cost": -1}}'], "h: cost: -1 is not a number of 0 to 1e+09"),
        (HEADER + ROWS, ["--kinds", '{"h": {"cost": NaN}}'], "h: cost: nan is not a number"),
        (HEADER + ROWS, ["--kinds", '{"h": {"cost": true}}'], "h: cost: True is not a number"),
        (
            HEADER + ROWS,
            ["--kinds", '{"h": {"cost": 1, "max_num_seqs": 0}}'],
            "max_num_seqs: 0 is not a whole number of 1",
        ),
        (HEADER + ROWS, ["--kinds", '{"h": {"cost": 1, "max_num_seqs": 1.5}}'], "max_num_seqs: 1.5 is not a whole"),
        (
            HEADER + ROWS,
            ["--kinds", '{"h": {"cost": 1, "step_s": Infinity}}'],
            "step_s: inf is not a number of 1e-06 to",
        ),
        (HEADER + ROWS, ["--kinds", '{"h": {"cost": 1, "step_s": 0}}'], "step_s: 0 is not a number of 1e-06 to 3,600"),
        (HEADER + ROWS, ["--curves", '{"step_s": -1}'], "step_s: -1 is not a number of 1e-06 to 3,600"),
        (HEADER + ROWS, ["--curves", '{"token_s": -1}'], "token_s: -1 is not a number of 0 to 3,600"),
        (HEADER + ROWS, ["--curves", "[]"], "an object of names and figures is needed"),
    ],
)
def test_what_cannot_be_played_is_named(text: str, arguments: list[str], words: str, tmp_path: Path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    if arguments[:1] in (["--kinds"], ["--curves"]):
        (tmp_path / "figures.json").write_text(arguments[1])
        arguments = [arguments[0], str(tmp_path / "figures.json"), *(["--advise", "0.9"] * (arguments[0] == "--kinds"))]
    assert words in refusal([str(trace), *arguments], capsys)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"timestamp": 1}', "trace.jsonl:1: no input_length, output_length, hash_ids"),
        ("[" * 100_000, "trace.jsonl:1: cannot be read as JSON"),
        ("[]", "trace.jsonl:1: no object"),
        (theirs(timestamp=1e300), "trace.jsonl:1: timestamp: 1e+300 is not a number of 0 to 10,000,000,000"),
        (theirs(timestamp=float("nan")), "trace.jsonl:1: timestamp: nan is not a number"),
        (theirs(input_length=1.5), "trace.jsonl:1: input_length: 1.5 is not a whole number of 1"),
        (theirs(output_length=0), "trace.jsonl:1: output_length: 0 is not a whole number of 1"),
        (theirs(output_length=True), "trace.jsonl:1: output_length: True is not a whole number of 1"),
        (theirs(hash_ids=[-1]), "trace.jsonl:1: hash_ids: -1 is not a whole number of 0"),
        (theirs(hash_ids=7), "trace.jsonl:1: hash_ids: 7 is not a list"),
    ],
)
def test_a_row_of_the_papers_form_is_named_with_its_column(row: str, words: str, tmp_path: Path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(row + "\n")
    assert words in refusal([str(trace)], capsys)


@pytest.mark.parametrize("rows", ["0,1000,20,\n", "7,1000,20,\n" * 5, "0,1000,20,\n" * 5])
def test_requests_that_all_come_at_once_are_played(rows: str, tmp_path: Path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text(HEADER + rows)
    assert main([str(trace), "--fixed", "1+1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_mark_of_byte_order_is_no_part_of_a_name(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text(HEADER + ROWS, encoding="utf-8-sig")
    assert main([str(trace), "--fixed", "1+1", "--only-fixed"]) == 0


def test_what_no_engine_can_hold_is_refused_as_the_service_refuses_it(tmp_path: Path):
    trace, figures, told = tmp_path / "trace.csv", tmp_path / "curves.json", tmp_path / "told.json"
    trace.write_text(HEADER + "1,60000,20,\n2,9000,2000,\n3,9000,20,\n")
    figures.write_text('{"num_kv_tokens": 10000}')
    options = ["--curves", str(figures), "--fixed", "1+1", "0+1", "--json", str(told)]
    assert main([str(trace), *options]) == 0
    found = json.loads(told.read_text())
    assert {name: row["num_refused"] for name, row in found.items()} == dict.fromkeys(found, 2)
    assert len(found) == 4


def test_what_cannot_be_written_is_said_in_one_line_behind_the_table(tmp_path: Path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text(HEADER + ROWS)
    assert main([str(trace), "--fixed", "1+1", "--only-fixed", "--json", "/dev/full"]) == 1
    said = capsys.readouterr()
    assert "1+1" in said.out and "cannot write what was found: [Errno 28]" in said.err.splitlines()[-1]


@pytest.mark.parametrize("package", ["matplotlib", "simpy"])
def test_without_a_package_it_names_the_extra(package: str, tmp_path: Path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert f"{package} is not installed; install the extra `simulator`" in refusal(
        ["trace.csv", "--plot", str(tmp_path / "r.png")], capsys
    )


def test_help_says_what_is_played_unless_told_otherwise(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("first token (default: 2)", "gaps (default: 0.05)", "pool (default: 32)", "sleep (default: 1+1)"):
        assert words in said


def test_a_trace_that_is_not_there_is_named(tmp_path: Path, capsys):
    assert "none.csv: cannot be read" in refusal([str(tmp_path / "none.csv")], capsys)


def test_how_many_gpus_of_which_kind_are_needed_is_said_in_words(tmp_path: Path, capsys):
    trace, kinds = tmp_path / "trace.csv", tmp_path / "kinds.json"
    trace.write_text(HEADER + ROWS)
    kinds.write_text(json.dumps({"fast": {"cost": 9.0}, "slow": {"cost": 1.0, "step_s": 0.008}}))
    assert main([str(trace), "--advise", "0.95", "--kinds", str(kinds)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"needed: .* on slow.*: \d+ GPUs?, which cost [\d.]+ an hour", said[-1])
    assert not any(line.startswith("32 colocated") for line in said), "few are tried first: they are soon played"


def test_without_pools_that_are_enough_it_says_what_to_change(tmp_path: Path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text(HEADER + ROWS)
    assert main([str(trace), "--advise", "0.95", "--ttft-s", "0.001", "--most", "3"]) == 1
    assert "allow more with --most, or set wider bounds" in capsys.readouterr().out
