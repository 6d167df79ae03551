"""`bench-gpu-handoff --speculation`: its prompts have something to find, and its figures are those of its samples."""

from array import array
from dataclasses import asdict

import pytest

from deployments.engine.speculation.lookup import Index
from tests.bench.bench_gpu_handoff import read_arguments
from tests.bench.counting import EDIT_EVERY, TEXT_TOKENS, edited_prompt
from tests.bench.guessed_handoff import ANSWER_TOKENS, Row, change_of, line_of, verdict_of
from tests.bench.timed_engines import config_of, moved_s
from tests.engine_pair import Arrivals

VOCAB_SIZE = 50_000


def rows() -> tuple[Row, Row]:
    """Of two engines: guesses make tokens take half as long, and hand-offs 2% longer, 10% behind the first token."""
    plain = Row(
        "off", 512, 64 << 20, [0.020, 0.021, 0.019], [0.002] * 3, [0.010] * 3, [0.008], [0.008], are_equal=[True]
    )
    guessed = Row(
        "ngram", 512, 64 << 20, [0.0204] * 3, [0.0022] * 3, [0.0102] * 3, [0.0041], [0.004], 40.0, 30.0, 0.001
    )
    return plain, guessed


def test_what_guesses_change_is_told_by_medians() -> None:
    change = asdict(change_of(*rows()))
    assert change.pop("tokens") == 512
    assert change == pytest.approx(
        {
            "ttft": 0.02,
            "in_place": 0.0226 / 0.022 - 1,
            "alone": 0.02,
            "handed_over_own": 0.025,
            "behind": 0.1,
            "token": 0.0041 / 0.008 - 1,
        }
    )


def test_a_share_above_what_is_asked_is_named_but_not_what_is_behind_the_first_token() -> None:
    plain, guessed = rows()
    assert verdict_of(change_of(plain, guessed)).endswith("behind +10.0%, token -48.7%; within 3%")
    guessed.own_token_s = [0.0039]
    assert verdict_of(change_of(plain, guessed)).endswith("more than 3%: handed_over_own")


def test_the_table_has_medians_and_says_where_an_answer_differs() -> None:
    plain, guessed = map(line_of, rows())
    assert " ".join(plain.split()) == "off 512 64 20.00 10.00 2.00 80% - 8.000 8.000 +0.0% - equal"
    assert " ".join(guessed.split()) == "ngram 512 64 20.40 10.20 2.20 78% 62.5 4.100 4.000 +2.5% 0.75 equal"
    row = rows()[0]
    row.are_equal.append(False)
    assert line_of(row).endswith("DIFFERENT")


def test_the_time_per_token_leaves_out_the_first_one() -> None:
    assert Arrivals([1, 2, 3, 4], [5.0, 5.5, 5.5, 6.5]).token_s == pytest.approx(0.5)


def test_the_bytes_own_way_is_the_copies_or_the_receiving_and_the_last_copy() -> None:
    copies = [(8, 1.0), (8, 2.0), (8, 3.0), (8, 4.0)]  # of two hand-offs, two chunks each
    assert moved_s(copies, 2, 0.0, 5) == 5.0
    assert moved_s(copies, 2, 10.0, 5) == 3.0 + 2.0


def test_lookup_finds_most_of_an_answer_that_counts_and_is_wrong_at_each_edit() -> None:
    prompt = edited_prompt(512, 1, VOCAB_SIZE)
    tokens, index, right, tried, steps = array("i", prompt), Index(), 0, 0, 0
    while len(tokens) < 512 + ANSWER_TOKENS:
        assert index.take(tokens)
        found, steps = index.find(tokens), steps + 1
        drafts = tokens[found[0] : found[0] + 8] if found else array("i")
        tried += len(drafts)
        for draft in drafts:
            if draft != tokens[-1] + 1:
                break
            tokens.append(draft)
            right += 1
        tokens.append(tokens[-1] + 1)
    assert ANSWER_TOKENS // EDIT_EVERY < steps < ANSWER_TOKENS / 2
    assert 0.5 < right / tried < 0.95


def test_prompts_have_the_length_that_is_asked_and_are_never_alike() -> None:
    prompts = [edited_prompt(length, length + seed, VOCAB_SIZE) for length in (512, 2048) for seed in range(5)]
    assert [len(prompt) for prompt in prompts] == [512] * 5 + [2048] * 5
    assert len({prompt[:16] for prompt in prompts}) == len(prompts), "nothing of one is cached for another"
    with pytest.raises(ValueError, match=str(TEXT_TOKENS)):
        edited_prompt(TEXT_TOKENS, 1, VOCAB_SIZE)


def test_arguments_are_read_and_those_without_effect_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = read_arguments(["--speculation", "ngram", "--lengths", "512,2048", "--ways", "nccl"])
    assert (options.speculation, options.lengths, options.ways, options.parts) == (
        "ngram",
        (512, 2048),
        ("nccl",),
        (1,),
    )
    assert read_arguments(["--parts", "1,4", "--ways", "cuda_ipc,nccl"]).parts == (1, 4)
    for wrong in (
        ["--shape", "tiny"],
        ["--speculation", "ngram", "--ways", "cuda_ipc,nccl"],
        ["--speculation", "ngram", "--parts", "1,4"],
    ):
        with pytest.raises(SystemExit):
            read_arguments(wrong)
    assert "--speculation" in capsys.readouterr().err


def test_a_prefill_engine_alone_keeps_what_it_has_computed() -> None:
    source, target = config_of(0, True, 8192, 1), config_of(1, True, 8192, 1, "ngram")
    assert (source.enable_prefix_caching, target.enable_prefix_caching) == (True, False)
    assert (source.speculation.method, target.speculation.method) == ("off", "ngram")
