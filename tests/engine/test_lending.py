"""KV that is copied out of one engine's cache and into another's beside their steps: tokens are those of one engine."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from deployments.engine.engine import Engine
from deployments.engine.kv.cache import KVCache, KVShape
from deployments.engine.kv.host_copies import HostCopies
from deployments.engine.lending import Stretch
from deployments.engine.scheduling.block_hash import hash_chain, root_of
from tests.engine.driving import BLOCK_SIZE, Transcript, build_engine, generate, greedy, run
from tests.engine.families import CPU, load, random_prompt, reference

PROMPT = random_prompt(57, seed=57)
HASHES = hash_chain(root_of(0), PROMPT, BLOCK_SIZE)


def copied_out(engine: Engine, hashes: list[bytes] = HASHES) -> np.ndarray:
    loan = engine.lending.lend(hashes)
    assert loan is not None
    data = np.zeros((len(hashes), engine.lending.bytes_per_block), np.uint8)
    engine.lending.copy_out(loan, data)
    engine.lending.give_back(loan)
    return data


def bring(engine: Engine, data: np.ndarray, num_blocks: int | None = None) -> None:
    """Bring what is not there, or so many blocks of it."""
    loan = engine.lending.reserve(HASHES[: len(data)])
    assert loan is not None
    rows = data[loan.num_cached :][:num_blocks]
    engine.lending.copy_in(loan, loan.num_cached, rows)
    engine.lending.bring(loan, (None,) * len(rows))
    engine.check_integrity()
    engine.lending.give_back(loan)
    engine.check_integrity()


def continued(engine: Engine, max_tokens: int = 12) -> Transcript:
    engine.add(greedy("r", PROMPT, max_tokens))
    return run(engine)


@pytest.mark.parametrize("is_pipelined", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"kv_dtype": "fp8"}], ids=["as computed", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_engine_goes_on_with_what_another_has_computed(is_pipelined: bool, overrides: Any, family: str) -> None:
    source, target = (build_engine(load(family), is_pipelined=is_pipelined, **overrides) for _ in range(2))
    expected = continued(source)
    bring(target, copied_out(source))
    found = continued(target)
    assert found.tokens == expected.tokens
    if not overrides:
        assert tuple(found.tokens["r"]) == reference(family, PROMPT, 12)
    assert found.cached["r"] == len(HASHES) * BLOCK_SIZE
    assert target.lending.num_hit_tokens == len(HASHES) * BLOCK_SIZE


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_only_what_is_missing_is_written_and_what_came_counts(family: str) -> None:
    source, target = build_engine(load(family)), build_engine(load(family))
    continued(source)
    generate(target, [greedy("earlier", PROMPT[:20], 1)])
    bring(target, copied_out(source), num_blocks=3)
    assert target.lending.num_cached(HASHES) == 2 + 3
    found = continued(target)
    assert tuple(found.tokens["r"]) == reference(family, PROMPT, 12)
    assert found.cached["r"] == 5 * BLOCK_SIZE
    assert target.lending.num_hit_tokens == 3 * BLOCK_SIZE


def test_a_block_that_is_cached_is_not_written_to() -> None:
    engine = build_engine(load("llama"))
    continued(engine)
    loan = engine.lending.reserve(HASHES)
    assert loan is not None and loan.num_cached == len(HASHES)
    with pytest.raises(AssertionError, match="others may read them"):
        engine.lending.copy_in(loan, 0, copied_out(engine))


def test_what_is_gone_is_not_lent_and_what_does_not_fit_is_not_reserved() -> None:
    engine = build_engine(load("llama"), num_blocks=10)
    continued(engine, 2)
    generate(engine, [greedy("other", random_prompt(57, seed=1), 2)])
    assert engine.lending.lend(HASHES) is None
    engine.add(greedy("runs", random_prompt(57, seed=2), 20))
    started = Transcript()
    started.note(engine.step())
    assert engine.lending.reserve(HASHES) is None
    engine.check_integrity()
    run(engine, started)


def test_a_copy_that_waits_for_a_core_takes_nobody_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, copyto = build_engine(load("llama")), np.copyto
    continued(engine)
    loan = engine.lending.lend(HASHES)
    assert loan is not None

    def copyto_late(*given: Any) -> None:
        time.sleep(0.03)
        copyto(*given)

    monkeypatch.setattr(np, "copyto", copyto_late)
    taken_s = engine.lending.copy_out(loan, np.zeros((len(HASHES), engine.lending.bytes_per_block), np.uint8))
    assert 0 < taken_s < 0.03
    engine.lending.give_back(loan)


def test_bytes_of_another_shape_are_refused() -> None:
    engine = build_engine(load("llama"))
    loan = engine.lending.reserve(HASHES)
    assert loan is not None
    with pytest.raises(ValueError, match="these blocks take"):
        engine.lending.copy_in(loan, 0, np.zeros((2, 8), np.uint8))
    engine.lending.give_back(loan)
    engine.check_integrity()


def test_stretches_are_told_once_they_are_whole_also_those_of_an_answer() -> None:
    engine = build_engine(load("llama"))
    engine.lending.watch(3)
    continued(engine, 40)
    told = engine.lending.take_fresh()
    assert not engine.lending.has_fresh.is_set()
    assert [stretch.end for stretch in told] == [3, 6, 9, 12]
    assert told[:2] == [Stretch(tuple(HASHES[:3]), 3), Stretch(tuple(HASHES[3:6]), 6)]
    continued(engine, 40)
    assert [stretch.end for stretch in engine.lending.take_fresh()] == [9, 12], "the prompt's were found"


def test_nothing_is_told_any_more_once_nobody_watches() -> None:
    engine = build_engine(load("llama"))
    engine.lending.watch(3)
    continued(engine, 2)
    engine.lending.unwatch()
    generate(engine, [greedy("other", random_prompt(57, seed=1), 2)])
    assert engine.lending.take_fresh() == []


def test_copies_of_bfloat16_are_byte_by_byte() -> None:
    shape = build_engine(load("llama")).kv_shape
    caches = [KVCache(KVShape(shape.groups, torch.bfloat16), 5, BLOCK_SIZE, CPU) for _ in range(2)]
    caches[0].blocks.normal_()
    data = np.zeros((2, HostCopies(caches[0]).bytes_per_block), np.uint8)
    HostCopies(caches[0]).copy_out([3, 1], None, data)
    HostCopies(caches[1]).copy_in([0, 4], None, data)
    assert torch.equal(caches[1].blocks[:, :, [0, 4]], caches[0].blocks[:, :, [3, 1]])
    assert not caches[1].blocks[:, :, 1:4].any()
