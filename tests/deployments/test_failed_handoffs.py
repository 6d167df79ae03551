"""What a hand-off that failed leaves behind in a prefill front."""

import asyncio
import gc
import weakref
from types import SimpleNamespace

import pytest

from deployments import prefill
from deployments.errors import TransferError


class Taken:
    """Stands for the reference that keeps chunks in place."""


def test_its_chunks_are_let_go_without_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[Taken]] = []

    async def fails() -> None:
        raise TransferError("the other engine died")

    def submit(*_: object) -> tuple[Taken, object]:
        reference = Taken()
        taken.append(weakref.ref(reference))
        return reference, fails()

    async def is_held(_: str) -> bool:
        return True

    async def send() -> list[object]:
        front = SimpleNamespace(engine=SimpleNamespace(handle=SimpleNamespace(renew=is_held)))
        computer = prefill.PromptComputer(front)  # type: ignore[arg-type]  # what is asked of a front here
        unread: list[object] = []
        events, place = SimpleNamespace(put=unread.append), asyncio.ensure_future(asyncio.sleep(0))
        await computer._send("r", None, events, place)  # type: ignore[arg-type]  # handed on alone
        return unread

    monkeypatch.setattr(prefill, "_submit", submit)
    gc.disable()
    try:
        unread = asyncio.run(send())
        assert [str(error) for error in unread] == ["the other engine died"]
        assert taken[0]() is None
    finally:
        gc.enable()
