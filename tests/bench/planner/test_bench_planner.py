"""`make bench-planner`: what it cannot play it does not call met."""

import pytest

from tests.bench.planner.bench_planner import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--traces", "bogus"], "--traces: invalid choice: 'bogus'"),
        (["--traces"], "--traces: expected at least one argument"),
        (["--length", "0"], "--length: '0' is not a number of 0.01 to 100"),
        (["--length", "-1"], "--length: '-1' is not a number"),
        (["--jobs", "0"], "--jobs: '0' is not a whole number of 1"),
        (["--mooncake", "none.jsonl", "--traces", "mooncake conversation"], "there is no trace at none.jsonl"),
    ],
)
def test_what_cannot_be_played_is_refused(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
