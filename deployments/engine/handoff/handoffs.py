"""All hand-offs of one engine, in both directions. For the engine's thread, but for what the outbox allows others."""

from collections.abc import Iterator

from deployments.engine.config import EngineLimits
from deployments.engine.execution.sizing import ExportRoom
from deployments.engine.handoff.exporter import Exporter
from deployments.engine.handoff.importer import Importer
from deployments.engine.handoff.inbox import Inbox
from deployments.engine.handoff.outbox import Outbox
from deployments.engine.handoff.states import Clock
from deployments.engine.kv.copies import KVCopies
from deployments.engine.stats import EngineStats


class Handoffs:
    """See the module.

    Attributes:
        inbox: what is awaited.
        outbox: chunks that wait to be taken.
        importer: brings prompts into the pool.
        exporter: copies prompts out of it.
    """

    def __init__(
        self, copies: KVCopies, limits: EngineLimits, room: ExportRoom, lease_s: float, clock: Clock, stats: EngineStats
    ) -> None:
        self.inbox = Inbox(lease_s, clock)
        self.outbox = Outbox(room.max_blocks, lease_s, clock)
        self.exporter = Exporter(self.outbox, copies, limits.block_size, room.max_chunk_blocks)
        self.importer = Importer(self.inbox, copies, limits.block_size, stats)

    def __iter__(self) -> Iterator[str]:
        """Requests whose KV comes or goes."""
        yield from self.exporter
        yield from self.inbox

    @property
    def next_expiry_s(self) -> float | None:
        """Seconds until the next lease runs out; None: there is none."""
        expiries = self.inbox.next_expiry_s(), self.outbox.next_expiry_s()
        return min((expiry for expiry in expiries if expiry is not None), default=None)

    def renew(self, request_id: str) -> bool:
        """The other engine lives; False: nothing is held for it here."""
        return self.inbox.renew(request_id) or self.outbox.renew(request_id)

    def discard(self, request_id: str) -> None:
        """The request is over. Unknown ones are no error."""
        self.exporter.discard(request_id)
        self.outbox.drop(request_id)
        self.importer.discard(request_id)
