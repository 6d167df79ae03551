"""All hand-offs of one engine, in both directions. For the engine's thread, but for what the outbox allows others."""

import logging
from collections.abc import Collection, Iterator

from deployments.engine.config import EngineLimits
from deployments.engine.execution.sizing import ExportRoom
from deployments.engine.handoff.exporter import Exporter
from deployments.engine.handoff.importer import Importer
from deployments.engine.handoff.inbox import Inbox
from deployments.engine.handoff.outbox import Outbox
from deployments.engine.handoff.states import Clock
from deployments.engine.kv.copies import KVCopies
from deployments.engine.stats import EngineStats

logger = logging.getLogger(__name__)


class Handoffs:
    """See the module.

    Attributes:
        inbox: what is awaited.
        outbox: chunks that wait for their receivers.
        importer: brings prompts into the pool.
        exporter: copies prompts out of it.
    """

    def __init__(
        self, copies: KVCopies, limits: EngineLimits, room: ExportRoom, lease_s: float, clock: Clock, stats: EngineStats
    ) -> None:
        self.inbox = Inbox(lease_s, clock, copies.num_layers)
        self.outbox = Outbox(room.max_blocks, lease_s, clock)
        self.exporter = Exporter(self.outbox, copies, limits, room.max_chunk_blocks)
        self.importer = Importer(self.inbox, copies, limits.block_size, stats)
        self._stats = stats

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

    def expired(self) -> tuple[list[str], list[str]]:
        """Requests whose other engine was not heard of within the lease: those awaited, and those kept for others.

        The engine computes the rest of the first ones' prompts, and drops the others, before it asks again.
        """
        awaited, kept = self.inbox.expired(), self.outbox.expired()
        for request_id in awaited:
            logger.warning("%s: no KV came within the lease; computing the rest of the prompt here", request_id)
        self._stats.expired_leases += len(awaited) + len(kept)
        return awaited, kept

    def discard(self, request_id: str) -> None:
        """The request is over. Unknown ones are no error."""
        self.exporter.discard(request_id)
        self.outbox.drop(request_id)
        self.importer.discard(request_id)

    def check_integrity(self, reserved: Collection[str]) -> None:
        """Assert that nothing is lost, and that just those are awaited for which blocks are reserved."""
        self.outbox.check_integrity()
        assert set(self.inbox) == set(reserved), f"{[*reserved]} are reserved, {[*self.inbox]} awaited"
