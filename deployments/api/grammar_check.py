"""Tells callers what is wrong with their grammars, before anything else of their calls is done.

Has them tried from a thread of its own, so that the event loop goes on; `examiners.py` says where. The engines compile
again, with the same bounds.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from deployments.api.examiners import Examiner
from deployments.errors import InvalidRequestError, OverloadedError
from deployments.grammars import GrammarError, VocabularyError, explain
from deployments.messages import Grammar

# Whoever has waited so long for others is sent away, and so is a grammar that takes so long itself.
TIMEOUT_S = 10.0
MAX_WAITING = 32
# More for the first, who wait for the vocabulary as well: one of 201,088 tokens takes 4 s of CPU.
_FIRST_TIMEOUT_FACTOR = 6


class GrammarCheck:
    """Of one model. Used in one event loop.

    Args:
        examiner: tries them. One that can be stopped should be, after `TIMEOUT_S`: until then nothing else is tried.
        timeout_s: see `TIMEOUT_S`.
    """

    def __init__(self, examiner: Examiner, timeout_s: float = TIMEOUT_S) -> None:
        self._examiner = examiner
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, "grammar-check")
        self._num_waiting = 0
        self._is_prepared = False

    async def check(self, grammar: Grammar) -> None:
        """Return if engines can follow a grammar.

        Raises:
            InvalidRequestError: they cannot; says why.
            OverloadedError: too many wait to be checked, or those before it take too long.
        """
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError(f"{self._num_waiting} grammars wait to be compiled", self._timeout_s)
        self._num_waiting += 1
        loop, has_begun = asyncio.get_running_loop(), asyncio.Event()
        begin = lambda: loop.call_soon_threadsafe(has_begun.set)  # noqa: E731
        checking = loop.run_in_executor(self._thread, self._check, grammar, begin)
        checking.add_done_callback(self._note_checked)
        try:
            await self._until_begun(has_begun, checking)
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(checking)
        except TimeoutError:
            message = f"{grammar.field} took longer than {self._timeout_s:g} s to compile"
            raise InvalidRequestError(message, grammar.field) from None
        except (GrammarError, VocabularyError) as error:
            raise explain(grammar, error) from None

    async def _until_begun(self, has_begun: asyncio.Event, checking: "asyncio.Future[None]") -> None:
        """A caller is not to blame for those before it, nor for the vocabulary."""
        beginning = asyncio.ensure_future(has_begun.wait())
        timeout_s = self._timeout_s * (1 if self._is_prepared else _FIRST_TIMEOUT_FACTOR)
        try:
            done, _ = await asyncio.wait((beginning, checking), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beginning.cancel()
        if not done:
            checking.cancel()
            raise OverloadedError(f"{self._num_waiting} grammars wait to be compiled", self._timeout_s)

    def _note_checked(self, checking: "asyncio.Future[None]") -> None:
        self._num_waiting -= 1
        if not checking.cancelled():
            checking.exception()  # whoever has waited no longer does not miss it

    def _check(self, grammar: Grammar, begin: Callable[[], object]) -> None:
        """In the thread."""
        self._examiner.prepare(grammar.end_token_ids)
        self._is_prepared = True
        begin()
        self._examiner.examine(grammar)
