"""How Ray Serve sends a call to the replica that it is meant for: the one that its request names (`Route`).

Serve makes one such router for each handle of a deployment that names it in `request_router_config`, in the process
that has the handle. It decides nothing: the ingress does, once for both pools (`routing/pools.py`). A call that names
nobody, or somebody who is not there or full, goes to the less busy of two, as with Serve's own router.
"""

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from deployments.messages import GenerateRequest

# Serve asks a replica how busy it is if it has not lately, and waits 0.1 s for the answer, then 0.2 s: one that is at
# work is no worse a choice for answering late.
_MAX_ASKS = 3


class NamedReplicaRouter(FIFOMixin, RequestRouter):
    """See the module.

    Where several calls wait at once, each gets the replica that was chosen for it; so does not `RequestRouter` by
    itself, which tells calls apart by the request from outside that they serve: of two choices of one call the second
    would wait for ever (Ray 2.60). What does not match goes to whoever waits longest, as with `FIFOMixin`.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named replica, and behind it the others."""
        name = _named(pending_request)
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
        others = [replica for replica in candidate_replicas if replica not in named]
        return [named] * _MAX_ASKS * bool(named) + [_two(others or named)]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None


def _named(pending_request: PendingRequest | None) -> str | None:
    """By what is asked, not by the pool: replicas of decode may compute prompts for others, too."""
    if pending_request is None or not pending_request.args:
        return None
    request = pending_request.args[0]
    if not isinstance(request, GenerateRequest):
        return None
    is_prefill = pending_request.metadata.call_method == "prefill"
    return request.route.prefill if is_prefill else request.route.decode


def _two(replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
    return random.sample(replicas, min(2, len(replicas)))
