"""What clients are told of an engine's death is one line; the traceback that Ray adds is for the log."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.engine_client import EngineClient
from deployments.errors import EngineDeadError
from deployments.messages import FrontEvent

RAYS = "\x1b[36mray::EngineActor.ping()\x1b[39m (pid=1)\n  File engine.py, line 1\nRuntimeError: the card is gone"


class LostEngine:
    """Answers nothing any more."""

    async def ping(self) -> None:
        raise RuntimeError(RAYS)

    async def events(self) -> AsyncIterator[list[FrontEvent]]:
        raise RuntimeError(RAYS)
        yield []


async def test_clients_are_told_of_a_death_in_one_line_and_the_log_in_many(caplog: pytest.LogCaptureFixture) -> None:
    handle: Any = LostEngine()
    info: Any = None
    deaths: list[str] = []
    client = EngineClient(handle, info, lambda: deaths.append("died"))
    queue = client.open("r")
    with caplog.at_level(logging.ERROR), pytest.raises(EngineDeadError) as raised:
        await client.check_health(5.0)
    assert str(raised.value) == "the engine died: RuntimeError: RuntimeError: the card is gone"
    assert "engine.py, line 1" in caplog.text
    with pytest.raises(EngineDeadError, match="the card is gone"):
        await anext(queue)
    assert deaths == ["died"]
