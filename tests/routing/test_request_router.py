"""Real Serve asks the router: prompts go to who has them, whoever starts late or dies."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments.request_router import PrefixRouter
from tests.routing.fake_pool import FakePool, Sender

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sender() -> Iterator[DeploymentHandle[Any]]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        small = serve.deployment(ray_actor_options={"num_cpus": 0.1})
        router: dict[str, Any] = {"request_router_class": PrefixRouter}
        pool = small(FakePool).options(num_replicas=2, request_router_config=RequestRouterConfig(**router)).bind()
        yield serve.run(small(Sender).bind(pool), route_prefix=None)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_prompts_go_to_who_has_them_until_it_dies(sender: DeploymentHandle[Any]) -> None:
    names = sender.read.remote().result()
    assert len(names) == 2
    first = sender.send.remote(1, 3).result()
    assert len(set(first)) == 1, "at once, before anybody has reported"
    sender.read.remote().result()
    assert set(sender.send.remote(1, 1).result()) == set(first)
    others = [sender.send.remote(token, 1).result()[0] for token in range(2, 12)]
    assert set(others) == set(names), "other prompts are spread"
    assert sender.kill_one.remote().result() == "ActorDiedError"
    (left,) = sender.replicas.remote().result()
    assert set(sender.send.remote(1, 3).result()) == {left}
