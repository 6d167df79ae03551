"""The project's router as Ray Serve asks it: chooses a replica of a pool for each call of a handle.

Serve makes one for each handle of a deployment that names it in `request_router_config`, in the process that has the
handle. It is told how the pool is by that process, which registers it (`routing/registry.py`) and reads the
replicas itself, each second as for admission; Serve's own way for such numbers goes through its controller, which hands
each router the last of them only, so that changes of a cache would be lost.

The prompt is that of the first argument of a call, a `GenerateRequest`. Calls without one go to any replica.
"""

import asyncio
import random
import time
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.messages import GenerateRequest
from deployments.routing.hashes import PromptHashes
from deployments.routing.registry import router_of
from deployments.routing.router import Routed


class PrefixRouter(RequestRouter):
    """Chooses by the router that this process has for the deployment; while it has none, at random."""

    def initialize_state(self, **_: Any) -> None:
        # Serve's id of a call is that of the call from outside which it serves, so several may have the same.
        self._sent: dict[str, list[Routed]] = {}
        self._choosing: dict[int, Routed] = {}  # by the future of the choice

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica, and behind it all others, for the case that it is full."""
        router = router_of(self._deployment_id.name)
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if router is None or pending_request is None or not isinstance(request, GenerateRequest):
            return [[random.choice(candidate_replicas)], candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        call, future = pending_request.metadata.internal_request_id, pending_request.future
        if (refused := self._choosing.pop(id(future), None)) is not None:
            self._end(call, refused, is_lost=True)
        else:
            future.add_done_callback(partial(self._settle, call))
        prompt = PromptHashes(request.prompt_token_ids)
        routed = router.route(prompt, time.monotonic(), num_new_tokens=request.sampling.max_tokens, among=by_name)
        self._choosing[id(future)] = routed
        self._sent.setdefault(call, []).append(routed)
        chosen = by_name[routed.replica]
        return [[chosen], [replica for replica in candidate_replicas if replica is not chosen]]

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve has seen it; forget what it had at once."""
        super().on_replica_actor_died(replica_id)
        if (router := router_of(self._deployment_id.name)) is not None:
            router.leave(replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A call has ended, or was refused by its replica."""
        for routed in self._sent.get(internal_request_id, []):
            if routed.replica == replica_id.unique_id:
                self._end(internal_request_id, routed, is_lost=False)
                return

    def _settle(self, call: str, future: "asyncio.Future[RunningReplica]") -> None:
        """Serve has a replica for a call, perhaps another since the chosen one was full; or its caller has left."""
        routed = self._choosing.pop(id(future))
        if future.cancelled() or future.result().replica_id.unique_id != routed.replica:
            self._end(call, routed, is_lost=True)

    def _end(self, call: str, routed: Routed, *, is_lost: bool) -> None:
        routed.ended(time.monotonic(), is_lost=is_lost)
        self._sent[call].remove(routed)
        if not self._sent[call]:
            del self._sent[call]
