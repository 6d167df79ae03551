"""The engine without a model does all that its loop and its process ask of an engine."""

import asyncio
from typing import Any

import pytest

from deployments.engine_builder import BuiltEngine
from deployments.engine_info import EngineInfo
from deployments.errors import InvalidRequestError
from deployments.local_engine import LocalEngine
from deployments.messages import Ended, FrontEvent, GenerateRequest, Placed, SamplingParams
from deployments.tokens.receiver import TokenReceiver
from tests.bench.serving.paced import MAX_PERIOD_US, PacedEngine, TokenLoop
from tests.waiting import PATIENCE_S

INFO = EngineInfo("paced", 100, 10, (), block_size=16, bytes_per_block=0, lease_s=15.0, pid=0, num_blocks=10)


def test_a_request_that_names_no_pace_is_refused() -> None:
    paced = PacedEngine(TokenLoop([3, 4], [1, 2]))
    drawn = SamplingParams(max_tokens=5, seed=2**63)  # as the API draws one where the caller gives none
    with pytest.raises(InvalidRequestError, match="9223372036854775808"):
        paced.check(GenerateRequest("r", (1, 2), drawn))
    paced.check(GenerateRequest("r", (1, 2), SamplingParams(max_tokens=5, seed=MAX_PERIOD_US)))


async def test_it_serves_and_reports() -> None:
    paced: Any = PacedEngine(TokenLoop([3, 4], [1, 2]))
    engine = LocalEngine(BuiltEngine(paced, INFO, None, "cpu"))
    receiver = await TokenReceiver.start("127.0.0.1", max_unread_tokens=100)
    try:
        async with asyncio.timeout(PATIENCE_S):
            stream = receiver.open("r", lambda: None, lambda stream: None)
            await engine.add(GenerateRequest("r", (1, 2), SamplingParams(max_tokens=5, seed=1)), None, receiver.address)
            tokens = [token_id async for output in stream for token_id in output.token_ids]
            told: list[FrontEvent] = []
            async for batch in engine.events():
                told += batch
                if any(isinstance(event, Ended) for event in batch):
                    break
            await engine.ping()
            stats, changes = await engine.report(None)
    finally:
        engine.stop()
        await receiver.stop()
    assert tokens == [3, 4, 3, 4, 3]
    assert told == [Placed("r", False, 0), Ended("r", None)]
    assert stats.generated_tokens == 5
    assert changes.changes == ()
