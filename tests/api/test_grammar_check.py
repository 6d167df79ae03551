"""Who is sent away, and with what, while grammars are compiled one after the other."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.api.grammar_check import GrammarCheck
from deployments.errors import InvalidRequestError, OverloadedError
from deployments.messages import Grammar

PATIENCE_S = 30.0


class Held:
    """A vocabulary, and a guide, that takes until the test lets go."""

    def __init__(self) -> None:
        self.reading, self.compiling = threading.Event(), threading.Event()
        self.lets_go = threading.Event()
        self.lets_read = threading.Event()
        self.lets_read.set()

    def make(self, end_token_ids: tuple[int, ...]) -> Any:
        self.reading.set()
        assert self.lets_read.wait(PATIENCE_S)
        return self

    def compile(self, grammar: Grammar) -> "Held":
        self.compiling.set()
        assert self.lets_go.wait(PATIENCE_S)
        return self

    def mask(self) -> bytes:
        return b""


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.lets_read.set()
    held.lets_go.set()


GRAMMAR = Grammar("start: /a/", (0,), "response_format")


async def test_a_grammar_that_takes_too_long_is_told_so(held):
    check = GrammarCheck(held.make, timeout_s=0.2)
    with pytest.raises(InvalidRequestError, match=r"response_format took longer than 0\.2 s to compile"):
        await check.check(GRAMMAR)


async def test_who_waits_behind_it_is_not_to_blame(held):
    check = GrammarCheck(held.make, timeout_s=0.2)
    first = asyncio.create_task(check.check(GRAMMAR))
    assert await asyncio.to_thread(held.compiling.wait, PATIENCE_S)
    with pytest.raises(OverloadedError, match="2 grammars wait to be compiled"):
        await check.check(GRAMMAR)
    with pytest.raises(InvalidRequestError):
        await first


async def test_nor_is_who_waits_for_the_vocabulary(held):
    held.lets_read.clear()
    with pytest.raises(OverloadedError):
        await GrammarCheck(held.make, timeout_s=0.2).check(GRAMMAR)


async def test_who_has_given_up_is_not_compiled_and_leaves_room(held):
    check = GrammarCheck(held.make, timeout_s=0.2)
    for _ in range(3):
        with pytest.raises((InvalidRequestError, OverloadedError)):
            await check.check(GRAMMAR)
    held.lets_go.set()
    await check.check(GRAMMAR)
