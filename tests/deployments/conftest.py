"""Pools that are stopped after the test, whatever it did to them."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest_asyncio

from tests.deployments.pools import Pools

StartPools = Callable[..., Awaitable[Pools]]


@pytest_asyncio.fixture
async def start() -> AsyncIterator[StartPools]:
    """Starts pools with steps of 32 tokens, so that `PROMPT` takes five; further options are those of `Pools.start`."""
    started: list[Pools] = []

    async def start(**options: object) -> Pools:
        started.append(await Pools.start(**{"max_num_batched_tokens": 32} | options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for pools in started:
        await pools.stop()
