"""Serve sends a call to the replica that its request names, and where that is not there to another."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest

from deployments.messages import GenerateRequest, Route, SamplingParams
from deployments.request_router import NamedReplicaRouter

REQUEST = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=1), route=Route(decode="b", prefill="c"))


@dataclass(frozen=True)
class Name:
    unique_id: str


@dataclass(frozen=True)
class Replica:
    replica_id: Name


REPLICAS: Any = [Replica(Name(name)) for name in "abcd"]


def router() -> NamedReplicaRouter:
    """As Serve makes one, but for what needs a Serve."""
    return NamedReplicaRouter.__new__(NamedReplicaRouter)


async def choose(method: str, *args: object, replicas: Any = REPLICAS) -> list[str]:
    """Names, in the order in which they are tried by a call of a method."""
    metadata = RequestMetadata("request", "call", call_method=method)
    ranks = await router().choose_replicas(replicas, PendingRequest(list(args), {}, metadata))
    return ["".join(sorted(replica.replica_id.unique_id for replica in rank)) for rank in ranks]


@pytest.mark.parametrize(("method", "name"), [("generate", "b"), ("prefill", "c")])
async def test_the_named_replica_is_tried_before_any_other(method: str, name: str) -> None:
    *first, last = await choose(method, REQUEST)
    assert first == [name] * 3, "it may be slow to answer"
    assert len(last) == 2 and name not in last
    assert await choose(method, REQUEST, replicas=REPLICAS[1:3]) == [name] * 3 + ["bc".replace(name, "")]
    assert await choose(method, REQUEST, replicas=[Replica(Name(name))]) == [name] * 4


@pytest.mark.parametrize(
    "request_", [replace(REQUEST, route=Route()), replace(REQUEST, route=Route("gone")), None, "x"]
)
async def test_a_call_that_names_nobody_who_is_there_goes_to_one_of_two(request_: object) -> None:
    chosen = [await choose("generate", *([] if request_ is None else [request_])) for _ in range(50)]
    assert {len(rank) for ranks in chosen for rank in ranks} == {2}
    assert {name for (rank,) in chosen for name in rank} == set("abcd")


async def test_calls_that_wait_at_once_get_each_their_own_replica() -> None:
    made = router()
    first, second = (PendingRequest([REQUEST], {}, metadata) for metadata in (object(), object()))  # type: ignore[arg-type]
    made._pending_requests_to_fulfill = [first, second]  # type: ignore[assignment]
    assert made._get_pending_request_matching_metadata(second.metadata) is second
    second.future.set_result("replica")
    assert made._get_pending_request_matching_metadata(second.metadata) is None
    assert made._get_pending_request_matching_metadata(first.metadata) is first
