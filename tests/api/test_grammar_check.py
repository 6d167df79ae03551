"""While grammars are compiled one after the other: who waits, who is sent away and why, and who is not delayed."""

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from deployments.api.examiners import Here
from deployments.api.grammar_check import GrammarCheck
from deployments.api.http import build_app
from deployments.api.text import TextCodec
from deployments.errors import InvalidRequestError, OverloadedError
from deployments.messages import FinishReason, Grammar, ModelInfo
from tests.api.fakes import CHAT, END_ID, body_of, build_tokenizer, playing, serving
from tests.waiting import PATIENCE_S

# Within it a busy machine has begun to compile.
TIMEOUT_S = 1.0
INFO = ModelInfo("fake/model", "", max_model_len=4096, vocab_size=257, eos_token_ids=(END_ID,))


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


STRICT_TOOL: Any = {"type": "function", "function": {"name": "f", "strict": True}}
GRAMMAR = Grammar("start: /a/", (0,), "response_format")


async def test_a_grammar_that_takes_too_long_is_told_so(held):
    check = GrammarCheck(Here(held.make), TIMEOUT_S)
    with pytest.raises(InvalidRequestError, match="response_format took longer than 1 s to compile"):
        await check.check(GRAMMAR)


async def test_who_comes_first_waits_longer_for_the_vocabulary(held, monkeypatch):
    held.lets_read.clear()
    held.lets_go.set()
    check = asyncio.create_task(GrammarCheck(Here(held.make), PATIENCE_S).check(GRAMMAR))
    assert await asyncio.to_thread(held.reading.wait, PATIENCE_S)
    pass_time(1.1 * PATIENCE_S, monkeypatch)
    done, _ = await asyncio.wait((check,), timeout=0.1)
    assert not done
    held.lets_read.set()
    await check


def pass_time(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it so much later for the event loop."""
    loop = asyncio.get_running_loop()
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + seconds)


async def test_who_waits_behind_it_is_not_to_blame(held):
    check = GrammarCheck(Here(held.make), TIMEOUT_S)
    first = asyncio.create_task(check.check(GRAMMAR))
    assert await asyncio.to_thread(held.compiling.wait, PATIENCE_S)
    with pytest.raises(OverloadedError, match="2 grammars wait to be compiled"):
        await check.check(GRAMMAR)
    with pytest.raises(InvalidRequestError):
        await first


async def test_nor_is_who_waits_for_the_vocabulary(held):
    held.lets_read.clear()
    with pytest.raises(OverloadedError):
        await GrammarCheck(Here(held.make), timeout_s=0.2).check(GRAMMAR)


async def test_who_has_given_up_is_not_compiled_and_leaves_room(held):
    check = GrammarCheck(Here(held.make), timeout_s=0.2)
    for _ in range(3):
        with pytest.raises((InvalidRequestError, OverloadedError)):
            await check.check(GRAMMAR)
    held.lets_go.set()
    async with asyncio.timeout(PATIENCE_S):
        while not await is_taken(check):  # the thread may be given no time for longer than the check waits
            pass


async def is_taken(check: GrammarCheck) -> bool:
    try:
        await check.check(GRAMMAR)
    except (InvalidRequestError, OverloadedError):
        return False
    return True


@pytest.mark.parametrize("fields", [{"guided_regex": "a"}, {"tools": [STRICT_TOOL]}])
async def test_while_a_grammar_is_compiled_others_get_their_tokens_and_may_come(
    held: Held, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.api.http.Vocabulary", lambda *_: held)
    monkeypatch.setattr("deployments.api.http.GrammarCheck", partial(GrammarCheck, timeout_s=PATIENCE_S))
    goes_on = asyncio.Event()
    backend = playing("a", goes_on, "b", "c", FinishReason.STOP)
    app = build_app(backend, TextCodec(build_tokenizer(), tool_parser="hermes"), INFO)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        async with client.stream("POST", CHAT, json=body_of(CHAT, stream=True)) as other:
            events = other.aiter_lines()
            assert "data: " in await anext(events)
            slow = asyncio.create_task(client.post(CHAT, json=body_of(CHAT, max_tokens=3, **fields)))
            assert await asyncio.to_thread(held.compiling.wait, PATIENCE_S)
            goes_on.set()
            assert (await client.post(CHAT, json=body_of(CHAT))).status_code == 200
            rest = [line async for line in events]
        assert rest[-2:] == ["data: [DONE]", ""] and not slow.done() and len(backend.requests) == 2
        held.lets_go.set()
        assert (await slow).status_code == 200
    assert len(backend.requests) == 3
