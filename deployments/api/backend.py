"""What the API asks of the pools behind it. The ingress has one; tests have others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from deployments.api.choices import TokenOutputs
from deployments.messages import GenerateRequest
from deployments.receipts import Receipt


class Ticket(Protocol):
    """Of a call that was let in."""

    def first_token(self, index: int) -> None:
        """The first token of the request at that place in the call was sent."""
        ...

    def close(self) -> None:
        """The call has ended, in whatever way."""
        ...


class Backend(Protocol):
    """The pools behind the API."""

    async def admit(self, requests: Sequence[GenerateRequest], key: bytes) -> Ticket:
        """Let a call in, before any of its requests is run. What comes back is closed, whatever happens.

        Args:
            requests: all of the call; their priority is one.
            key: tells callers apart.

        Raises:
            OverloadedError: too much is queued; says when to try again.
            RequestTooLargeError: trying again would not help.
        """
        ...

    def generate(
        self,
        request: GenerateRequest,
        on_overflow: Callable[[], None],
        on_receipt: Callable[[Receipt], None] | None = None,
        *,
        holds_last: bool = True,
    ) -> TokenOutputs:
        """Run a request. Closing what comes back aborts it on every pool; so each is closed, whatever happens.

        Args:
            request: the prompt.
            on_overflow: called when the reader has left too many tokens unread. The request is over then, and
                the next output that is asked for is `SlowReaderError`.
            on_receipt: called with what is known of how the request is served, whenever that is more. None: nobody
                wants to know.
            holds_last: all of that is known before the last output comes; else it may come a moment after it.

        Raises:
            KvRelayError: at any point; before the first token it still becomes a status code.
        """
        ...

    async def health(self) -> tuple[bool, str]:
        """Can the pools serve, and if not, why not."""
        ...

    async def metrics(self) -> bytes:
        """Prometheus' text exposition."""
        ...

    async def live(self) -> Mapping[str, object]:
        """The service as it is and as its last minutes were, for the page and for terminals."""
        ...
