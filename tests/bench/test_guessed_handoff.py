"""`bench-gpu-handoff --speculation`: its prompts have something to find, and its figures are those of its samples."""

from array import array
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import ray

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine.engine import Engine
from deployments.engine.speculation.lookup import Index
from deployments.engine.stats import EngineStats
from deployments.kv_transfer.base import TransferStats
from deployments.messages import GenerateRequest, SamplingParams, TokenOutput
from tests.bench import guessed_handoff
from tests.bench.bench_gpu_handoff import read_arguments
from tests.bench.counting import EDIT_EVERY, TEXT_TOKENS, edited_prompt, load_counting
from tests.bench.guessed_handoff import ANSWER_TOKENS, Row, change_of, line_of, verdict_of
from tests.bench.timed_engines import config_of, moved_s
from tests.bench.two_gpus.model import config_of as config_of_shape
from tests.engine_pair import Arrivals, HandOver

VOCAB_SIZE = 50_000
# Whatever it is expected to bring: a small model's steps take about as long with drafts as without.
NGRAM = SpeculationConfig(method="ngram", is_adaptive=False)


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


def counted(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What a model that counts says behind it."""
    return list(range(prompt[-1] + 1, prompt[-1] + 1 + num_tokens))


class FakeActor:
    """Answers what a comparison asks of an actor: each answer has tried 40 more drafts, of which 30 were right."""

    def __init__(self) -> None:
        self.found = EngineStats()
        self.stats, self.transfer_stats = Asked(self._stats), Asked(TransferStats)

    def answered(self) -> None:
        self.found.drafted_tokens.observe(40)
        self.found.accepted_tokens.observe(30)

    def _stats(self) -> EngineStats:
        return replace(
            self.found,
            drafted_tokens=self.found.drafted_tokens.copy(),
            accepted_tokens=self.found.accepted_tokens.copy(),
        )


class Asked:
    """A method of an actor, whose result is there at once."""

    def __init__(self, method: Callable[[], Any]) -> None:
        self.remote = method


class FakeEngine:
    """Notes what it is given to do, and counts."""

    def __init__(self, method: str, told: list[tuple[str, str, int]]) -> None:
        self.method, self.told, self.actor = method, told, FakeActor()

    def answer(self, prompt: tuple[int, ...], name: str, max_tokens: int) -> Arrivals:
        self.told.append((self.method, "own", max_tokens))
        self.actor.answered()
        return Arrivals(
            list(range(prompt[-1] + 1, prompt[-1] + 1 + max_tokens)), [0.004 * i for i in range(max_tokens)]
        )

    def hand_over(self, prompt: tuple[int, ...], max_tokens: int) -> HandOver:
        self.told.append((self.method, "handed", max_tokens))
        if max_tokens > 2:
            self.actor.answered()
        return HandOver(counted(prompt, max_tokens), 64, 0.01, 0.002, 0.02, 0.0041)


def test_the_engines_take_turns_and_every_answer_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_over(
        source: object, target: FakeEngine, prompt: tuple[int, ...], name: str, max_tokens: int = 2
    ) -> HandOver:
        return target.hand_over(prompt, max_tokens)

    told: list[tuple[str, str, int]] = []
    monkeypatch.setattr(guessed_handoff, "hand_over", hand_over)
    monkeypatch.setattr(guessed_handoff, "REST_S", 0.0)
    monkeypatch.setattr(ray, "get", lambda found: found)
    engines: Any = {method: FakeEngine(method, told) for method in ("off", "ngram")}
    found = guessed_handoff.Comparison(engines["off"], engines, VOCAB_SIZE, on_gpu=False).measure(512, 2, 2)
    long, short = ANSWER_TOKENS, 2
    warm = [(method, kind, long) for method in ("off", "ngram") for kind in ("handed", "own")]
    rounds = [(method, "handed", short) for method in ("off", "off", "ngram", "ngram", "ngram", "ngram", "off", "off")]
    answers = [*warm, *[(method, kind, long) for method in ("ngram", "off") for kind in ("own", "handed")]]
    assert told == [*warm, *rounds, *answers]
    for row in found:
        assert (len(row.ttft_s), len(row.alone_s), len(row.handed_token_s), len(row.own_token_s)) == (4, 2, 2, 2)
        assert (row.drafted, row.accepted, row.are_equal) == (160.0, 120.0, [True] * 4)
    assert "handed over own +2.5%" in verdict_of(change_of(*found))


def test_a_small_model_on_a_cpu_counts_behind_such_a_prompt() -> None:
    loaded = load_counting(config_of_shape("tiny"), "cpu")
    config = EngineConfig(max_num_seqs=2, max_model_len=1024, kv_cache_bytes=16 << 20, speculation=NGRAM)
    engine = Engine(loaded, config)
    prompt = edited_prompt(512, 1, loaded.vocab_size)
    engine.add(GenerateRequest("r", prompt, SamplingParams(max_tokens=40, temperature=0.0)))
    told: list[int] = []
    while engine.has_work:
        told += [token for event in engine.step() if isinstance(event, TokenOutput) for token in event.token_ids]
    assert told == counted(prompt, 40)
    assert engine.stats().accepted_tokens.total > 10
