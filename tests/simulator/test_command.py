"""`python -m deployments.simulator`: what is wrong with what it is given it names; what it finds it says in words."""

import json
import re
from pathlib import Path

import pytest

from deployments.simulator.__main__ import main

HEADER = "arrival_s,prompt_tokens,output_tokens,prefix_ids\n"
ROWS = "".join(f"{i / 10},1000,20,\n" for i in range(50))


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("a,b\n1,2\n", [], "trace.csv:1: no column arrival_s, prompt_tokens, output_tokens, prefix_ids"),
        (HEADER, [], "the trace has no request"),
        (HEADER + "0.5,many,3,\n", [], "trace.csv:2: invalid literal for int() with base 10: 'many'"),
        (HEADER + "-1,5,3,\n", [], "5 prompt tokens at -1.0 s"),
        (HEADER + ROWS, ["--fixed", "3"], "'3' is not P+D"),
        (HEADER + ROWS, ["--advise", "95"], "95 is not a share"),
        (HEADER + ROWS, ["--kinds", '{"h": {"step_s": 1}}'], "h: no cost"),
        (HEADER + ROWS, ["--kinds", '{"h": {"cost": 1, "stepp": 1}}'], "no figure 'stepp'; there are step_s, token_s"),
        (HEADER + ROWS, ["--curves", '{"step_s": -1}'], "step_s: -1 is not a number of at least 0"),
        (HEADER + ROWS, ["--curves", "[]"], "an object of names and figures is needed"),
    ],
)
def test_what_cannot_be_played_is_named(text: str, arguments: list[str], words: str, tmp_path: Path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    if arguments[:1] in (["--kinds"], ["--curves"]):
        (tmp_path / "figures.json").write_text(arguments[1])
        arguments = [arguments[0], str(tmp_path / "figures.json")]
    with pytest.raises(SystemExit) as ended:
        main([str(trace), *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_trace_that_is_not_there_is_named(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.csv")])
    assert "none.csv: cannot be read" in capsys.readouterr().err


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
