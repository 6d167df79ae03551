"""Blocks that are copied to the host's memory and back on streams of their own, while steps run."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from deployments.engine.engine import Engine
from deployments.engine.scheduling.block_hash import hash_chain, root_of
from tests.engine.driving import Transcript, greedy, run
from tests.gpu.driving import build, prompt

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

LENGTH = 1500
HASHES = hash_chain(root_of(0), prompt(LENGTH), 256)


def copied_out(engine: Engine) -> np.ndarray:
    loan = engine.lending.lend(HASHES)
    assert loan is not None
    data = np.full((len(HASHES), engine.lending.bytes_per_block), 0xAB, np.uint8)
    engine.lending.copy_out(loan, data)
    engine.lending.give_back(loan)
    return data


def bring(engine: Engine, data: np.ndarray) -> None:
    """Each block by a thread of its own."""
    loan = engine.lending.reserve(HASHES)
    assert loan is not None and loan.num_cached == 0
    with ThreadPoolExecutor(len(HASHES)) as threads:
        copies = [threads.submit(engine.lending.copy_in, loan, i, data[i : i + 1]) for i in range(len(HASHES))]
        for copy in copies:
            copy.result()
    engine.lending.bring(loan, (None,) * len(HASHES))
    engine.lending.give_back(loan)
    engine.check_integrity()


def test_blocks_are_those_that_the_step_in_flight_computes_and_steps_go_on_meanwhile() -> None:
    engine = build("llama")
    for i in range(4):
        engine.add(greedy(f"other {i}", prompt(300 + i), 200))
    engine.add(greedy("r", prompt(LENGTH), 8))
    transcript = Transcript()
    while engine.lending.num_cached(HASHES) < len(HASHES):
        transcript.note(engine.step())  # launched, and not concluded yet
    loan = engine.lending.lend(HASHES)
    assert loan is not None
    data = np.full((len(HASHES), engine.lending.bytes_per_block), 0xAB, np.uint8)
    with ThreadPoolExecutor(1) as threads:
        copy = threads.submit(engine.lending.copy_out, loan, data)
        while not copy.done():
            transcript.note(engine.step())
        copy.result()
    engine.lending.give_back(loan)
    run(engine, transcript)
    assert np.array_equal(data, copied_out(engine))
    assert (data != 0xAB).any(axis=1).all()


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_another_engine_goes_on_with_them_as_the_first_does_with_its_own(kv_dtype: str) -> None:
    source, target = build("llama", kv_dtype=kv_dtype), build("llama", kv_dtype=kv_dtype)
    source.add(greedy("cold", prompt(LENGTH), 8))
    run(source)
    data = copied_out(source)
    target.add(greedy("runs", prompt(700), 300))
    transcript = Transcript()
    for _ in range(5):
        transcript.note(target.step())
    bring(target, data)
    run(target, transcript)
    assert np.array_equal(copied_out(target), data)
    tokens = []
    for engine in (source, target):
        engine.add(greedy("warm", prompt(LENGTH), 24))
        found = run(engine)
        assert found.cached["warm"] == len(HASHES) * 256
        tokens.append(found.tokens["warm"])
    assert tokens[0] == tokens[1]


def test_blocks_that_are_pinned_are_copied_from_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = build("llama"), build("llama")
    source.add(greedy("cold", prompt(LENGTH), 8))
    run(source)
    data = copied_out(source)
    pinned = target.lending.pinned
    assert pinned is not None
    page, page_bytes = data.ctypes.data // 4096 * 4096, data.nbytes + 8192
    for start in range(0, page_bytes, 3 << 20):  # blocks of 4 MiB lie in two pieces, or in three
        pinned.pin(page + start, min(3 << 20, page_bytes - start))
    with monkeypatch.context() as patched:
        patched.setattr(np, "copyto", lambda *_: pytest.fail("copied within the host"))
        bring(target, data)
    run(target)
    assert np.array_equal(copied_out(target), data)
    pinned.unpin()
