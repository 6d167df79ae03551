"""Tells callers what is wrong with their grammars, before anything else of their calls is done.

Compiles in a thread of its own, which does not stop the event loop: llguidance lets go of the interpreter's lock. The
engines compile again, with the same bounds.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from deployments.api.text import TextCodec
from deployments.errors import InvalidRequestError, OverloadedError
from deployments.grammars import GrammarError, Vocabularies, Vocabulary, VocabularyError, explain
from deployments.messages import Grammar

# In this time a grammar has waited for those before it and is compiled, or it is refused.
TIMEOUT_S = 10.0
MAX_WAITING = 32


class GrammarCheck:
    """Of one model. Used in one event loop.

    Args:
        codec: of the model.
        vocab_size: of the model.
    """

    def __init__(self, codec: TextCodec, vocab_size: int) -> None:
        self._vocabularies = Vocabularies(lambda ends: Vocabulary(codec.backend.to_str(), vocab_size, ends))
        self._thread = ThreadPoolExecutor(1, "grammar-check")
        self._num_waiting = 0

    async def check(self, grammar: Grammar) -> None:
        """Return if engines can follow a grammar.

        Raises:
            InvalidRequestError: they cannot; says why.
            OverloadedError: too many wait to be checked.
        """
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError(f"{self._num_waiting} grammars wait to be compiled", TIMEOUT_S)
        self._num_waiting += 1
        checking = asyncio.get_running_loop().run_in_executor(self._thread, self._check, grammar)
        checking.add_done_callback(self._note_checked)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.shield(checking)
        except TimeoutError:
            message = f"{grammar.field} took longer than {TIMEOUT_S:g} s to compile, those before it included"
            raise InvalidRequestError(message, grammar.field) from None
        except (GrammarError, VocabularyError) as error:
            raise explain(grammar, error) from None

    def _note_checked(self, checking: "asyncio.Future[None]") -> None:
        self._num_waiting -= 1
        if not checking.cancelled():
            checking.exception()  # whoever has waited no longer does not miss it

    def _check(self, grammar: Grammar) -> None:
        """In the thread."""
        self._vocabularies.compile(grammar).mask()
