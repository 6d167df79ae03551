"""Pools that may have no replica: which settings allow it, and how what ingresses hold wakes them."""

import pytest
from ray.serve._private.common import ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig

from app.arguments import ConfigError
from app.config import AppConfig
from deployments.load.held import Held, HoldBounds
from deployments.planner.wire import numbers_of_ingress
from deployments.pool_policy import IngressPolicy
from tests.deployments.controller import Controller

NO_PREFILL = {"prefill.min_replicas": "0", "planner.enabled": "true", "parity_check": "false"}
NO_DECODE = {"decode.min_replicas": "0", "planner.enabled": "true"}


@pytest.mark.parametrize("pools", [{"mode": "colocated"}, {}, NO_PREFILL])
def test_decode_may_have_no_replica_where_the_planner_starts_one(pools):
    config = AppConfig.model_validate(
        pools | NO_DECODE | {"ingress.max_start_s": "7", "decode.max_queued_requests": "9"}
    )
    scaling = AutoscalingConfig(**config.deployment_options("decode")["autoscaling_config"])
    assert (scaling.min_replicas, scaling.initial_replicas) == (0, 1), (
        "the ingress learns from the first what is served"
    )
    assert config.hold_bounds() == HoldBounds(max_requests=9, max_s=7.0)
    # What is held is told to the planner after a moment.
    assert config.deployment_options("ingress")["autoscaling_config"]["metrics_interval_s"] < 0.5
    assert AppConfig().hold_bounds() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planner.enabled": "false"}, "decode.min_replicas=0: needs planner.enabled=true"),
        ({"planner.dry_run": "true"}, "decode.min_replicas=0: needs planner.dry_run=false"),
        ({"planner.hold_s": "5"}, "decode.min_replicas=0: needs planner.hold_s of more than 5"),
        ({"planner.max_cost": "1.5"}, "planner.max_cost=1.5: one decode replica, .* cost 2"),
    ],
)
def test_no_decode_replica_is_refused_where_nobody_would_start_one(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AppConfig.model_validate(NO_DECODE | arguments)


class Sleeper(Controller):
    """Both pools may have no replica; ingress replicas tell what each of them holds."""

    def __init__(self, **settings) -> None:
        super().__init__(hold_s=5.0, **settings)
        self.bounds = dict.fromkeys(self.policies, (0, 10))
        self.ingress = IngressPolicy(False, self.settings)
        self.held = Held()  # by the first one
        self.held_by_others: list[Held] = []

    def loop(self, seconds=0.5) -> dict[str, int]:
        targets = super().loop(seconds)
        context = self.context("decode")
        context.raw_metrics = {}
        for number, held in enumerate((self.held, *self.held_by_others)):
            replica = ReplicaID(f"i{number}", context.deployment_id)
            for name, value in numbers_of_ingress(0, held).items():
                context.raw_metrics.setdefault(name, {})[replica] = [TimeStampedValue(self.now_s, value)]
        self.ingress(context)
        for pool, num_left in targets.items():
            del self.stats[pool][num_left:]
        return targets


@pytest.fixture(params=[False, True], ids=["no flips", "flips"])
def sleeper(request) -> Sleeper:
    controller = Sleeper(flip=request.param)
    controller.run(10)
    controller.run(300, tokens=0)
    assert controller.targets == {"decode": 0, "prefill": 0}
    return controller


def test_held_requests_wake_decode_in_the_next_turn_of_the_controller(sleeper):
    sleeper.loop()  # it has just planned
    sleeper.held = Held(1, 20, 0.1)
    sleeper.loop(0.2)
    assert sleeper.loop(0.2) == {"decode": 1, "prefill": 0}


def test_what_several_ingress_replicas_hold_wakes_as_many_as_all_of_it_needs(sleeper):
    seats = sleeper.engine().max_num_seqs
    sleeper.held = Held(1, 20, 0.1)
    for _ in range(3):
        sleeper.loop()
    assert sleeper.targets["decode"] == 1, "one asks for little"
    sleeper.held_by_others = [Held(seats, 20 * seats, 0.1)] * 2
    for _ in range(3):
        sleeper.loop()
    assert sleeper.targets["decode"] == 3


def test_it_stays_awake_until_what_was_held_is_served_and_sleeps_again(sleeper):
    sleeper.held = Held(2, 40, 0.1)
    for _ in range(60):
        sleeper.loop()
    assert sleeper.targets["decode"] == 1
    sleeper.stats["decode"] = [sleeper.engine()]
    sleeper.held = Held()
    sleeper.run(3, tokens=0)
    assert sleeper.targets["decode"] == 1
    sleeper.run(300, tokens=0)
    assert sleeper.targets["decode"] == 0


def test_what_no_ingress_tells_any_more_is_not_held(sleeper):
    sleeper.held = Held(2, 40, 0.1)
    sleeper.loop()
    sleeper.held = Held()
    sleeper.run(20, tokens=0)
    assert sleeper.targets["decode"] == 1, "it is starting"
    sleeper.stats["decode"] = [sleeper.engine()]
    sleeper.run(300, tokens=0)
    assert sleeper.targets["decode"] == 0


def test_while_serve_itself_starts_the_first_replica_decode_counts_as_scaled_by_its_policy(sleeper, caplog):
    """A call that waits at a handle has Serve start one, and it asks no policy until that is there."""
    decode = sleeper.policies.pop("decode")
    with caplog.at_level("WARNING"):
        sleeper.run(30, tokens=0)
    assert caplog.messages == []
    sleeper.policies["decode"] = decode
    sleeper.targets["decode"], sleeper.stats["decode"] = 1, [sleeper.engine()]
    sleeper.run(3, tokens=0)
    assert sleeper.targets["decode"] == 1, "as if somebody had set it"
