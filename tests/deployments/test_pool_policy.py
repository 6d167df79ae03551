"""Ray Serve follows the planner: what its policies are told, and what they answer."""

import re
from itertools import pairwise

import pytest
from ray.serve._private.common import ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig

from app.arguments import ConfigError
from app.config import PLANNERS_OWN, AppConfig
from deployments.engine.stats import EngineStats
from deployments.planner import shared
from deployments.planner.observer import Observer
from deployments.planner.settings import PlannerSettings
from deployments.planner.wire import REFUSED, of_numbers, to_numbers
from deployments.pool_policy import IngressPolicy, PoolPolicy, view_of
from tests.deployments.controller import Controller


@pytest.fixture
def observed(monkeypatch) -> list[tuple[float, int]]:
    """When planners observed the pools, and how many refused calls they were told of then."""
    seen: list[tuple[float, int]] = []
    observe = Observer.observe

    def note(self, reading, at_s, num_refused=0):
        seen.append((at_s, num_refused))
        return observe(self, reading, at_s, num_refused)

    monkeypatch.setattr(Observer, "observe", note)
    return seen


def test_what_an_engine_says_comes_back_from_numbers_as_it_was():
    stats = EngineStats(num_running=3, prefill_s=1.25, tier_fetch_s=0.5, num_blocks=7)
    stats.itl_s.observe(0.02, 5)
    assert of_numbers(to_numbers(stats)) == stats
    assert of_numbers({"ongoing": 1.0}) is None


def test_prompts_that_wait_add_prefill_replicas_within_three_seconds():
    controller = Controller()
    controller.run(30)
    assert controller.targets == {"decode": 1, "prefill": 1}
    controller.run(3, queued=40_000)
    assert controller.targets["prefill"] > 3 and controller.targets["decode"] == 1


def test_both_policies_share_one_planner_and_one_observation_every_two_seconds(observed):
    controller = Controller()
    controller.run(1)
    before = observed.copy()
    assert len(before) == 1
    controller.loop(1.4)
    assert observed == before
    controller.loop(0.7)
    assert observed == [*before, (controller.now_s, 0)]


def test_a_count_that_was_set_by_hand_is_kept_and_then_reduced():
    controller = Controller(hold_s=20.0)
    controller.run(30)
    controller.targets["decode"] = 6
    controller.run(15)
    assert controller.targets["decode"] == 6
    controller.run(10)
    assert controller.targets["decode"] == 1


def test_a_restart_of_the_controller_changes_nothing_though_it_hears_of_some_replicas_late():
    controller = Controller()
    controller.bounds = dict.fromkeys(controller.policies, (1, 16))
    controller.targets = dict.fromkeys(controller.policies, 3)
    old = {pool: [controller.engine() for _ in range(3)] for pool in controller.policies}
    for engine in [*old["decode"], *old["prefill"]]:
        engine.uptime_s, engine.steps, engine.finished = 100_000.0, 500_000, 30_000
    for engine in old["prefill"]:
        engine.prompt_tokens, engine.prefill_steps, engine.prefill_s = 30_000_000, 30_000, 3_000.0
    controller.stats = {pool: engines[:2] for pool, engines in old.items()}
    controller.run(2)
    controller.stats = old
    for _ in range(50):
        controller.run(1)
        assert controller.targets == {"decode": 3, "prefill": 3}


def test_bounds_that_change_are_kept_at_once():
    controller = Controller()
    controller.run(5)
    controller.bounds["decode"] = (4, 8)
    assert controller.loop()["decode"] == 4


def test_an_application_has_one_planner_until_its_settings_are_others():
    controller = Controller()
    settings = PlannerSettings.model_validate(controller.settings)
    planner = shared.planner_of(controller.app, settings, False)
    assert shared.planner_of(controller.app, settings, False) is planner
    assert shared.planner_of(controller.app, settings.model_copy(update={"ttft_s": 9.0}), False) is not planner


@pytest.mark.parametrize(
    ("settings", "is_known"), [({"max_cost": 9.0}, True), ({"hold_s": 30.0}, True), ({"ttft_s": 2.0}, False)]
)
def test_what_has_come_is_known_under_other_settings_unless_bounds_are_others(monkeypatch, settings, is_known):
    told = []
    controller = Controller(hold_s=20.0)
    controller.run(120, tokens=5000)
    controller.policies = {pool: PoolPolicy(pool, False, controller.settings | settings) for pool in controller.targets}
    called = type(controller.policies["decode"]).__call__.__globals__  # see below
    monkeypatch.setitem(called, "publish", lambda app, decisions: told.extend(decisions))
    controller.run(4, tokens=5000)
    controller.run(4, tokens=5000, queued=20_000)
    (lasting,) = re.findall(r"engines' worth of prompts come \(([\d.]+) over a while", told[-1].reason)
    assert 0.9 < float(lasting) < 1.1 if is_known else float(lasting) > 1.3


def test_each_change_is_kept_with_its_reason_and_told_once(monkeypatch):
    told = []
    controller = Controller()
    # Not the module's: whoever reads a policy out of Serve's configuration gives the class methods of another one.
    called = type(controller.policies["decode"]).__call__.__globals__
    monkeypatch.setitem(called, "publish", lambda app, decisions: told.append((app, decisions)))
    controller.run(30)
    ((app, (first,)),) = told
    assert app == controller.app, "it said what it wants, which was what there was"
    assert (first.before, first.targets, first.is_dry_run) == (first.targets, {"decode": 1, "prefill": 1}, False)
    controller.run(3, queued=40_000)
    assert [decisions[0] for _, decisions in told] == [first] * len(told)
    _, (_, second, *others) = told[-1]
    assert len(told) == 2 + len(others), "each time all that are kept, and only when there is one more"
    assert "prefill 1 to " in second.reason and 1000.0 < second.at_s <= controller.now_s
    assert [second, *others][-1].targets == controller.targets


def test_a_dry_run_tells_what_it_would_do_and_leaves_it_to_serve(caplog):
    controller = Controller(dry_run=True)
    context = controller.context("prefill")
    assert controller.policies["prefill"](context)[0] == 0  # by ongoing requests; Serve keeps to the bounds
    with caplog.at_level("INFO"):
        for second in range(30):
            controller.targets = {"decode": 1, "prefill": 1}
            controller.run(1, queued=40_000 if second > 20 else 0)
    wanted = [found[1] for line in caplog.messages if (found := re.search(r"dry run.*prefill 1 to (\d+)", line))]
    assert wanted and all(before != after for before, after in pairwise(wanted)), "each plan is told once"


def test_replicas_that_have_told_nothing_yet_are_not_ready():
    controller = Controller()
    context = controller.context("decode")
    context.raw_metrics = {}
    assert view_of(context).engines == {}
    assert controller.policies["decode"](context) == (1, {})


def test_the_settings_reach_serve_as_a_policy_without_delays():
    config = AppConfig.model_validate({"planner.enabled": "true", "prefill.max_replicas": "4"})
    given = config.deployment_options("prefill")["autoscaling_config"]
    serve = AutoscalingConfig(**given)
    assert serve.policy.policy_function == "deployments.pool_policy.PoolPolicy"
    assert isinstance(serve.policy.get_policy()(**serve.policy.policy_kwargs), object)
    assert (serve.upscale_delay_s, serve.downscale_delay_s) == (0.0, 0.0)
    assert "policy" not in AppConfig().deployment_options("prefill")["autoscaling_config"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefill.autoscaling_config.upscale_delay_s": "5"}, "leave out prefill.autoscaling_config.upscale_delay_s"),
        (
            {"decode.autoscaling_config.upscaling_factor": "0.5"},
            "upscaling_factor; set planner.quantile and planner.max",
        ),
        (
            {"decode.autoscaling_config.downscaling_factor": "2"},
            "leave out decode.autoscaling_config.downscaling_factor",
        ),
        ({"decode.autoscaling_config.smoothing_factor": "2"}, "leave out decode.autoscaling_config.smoothing_factor"),
        ({"decode.autoscaling_config.downscale_smoothing_factor": "2"}, "config.downscale_smoothing_factor"),
        ({"prefill.autoscaling_config.upscale_smoothing_factor": "2"}, "config.upscale_smoothing_factor"),
        ({"decode.autoscaling_config.downscale_to_zero_delay_s": "9"}, "zero_delay_s; set planner.hold_s instead"),
        ({"decode.autoscaling_config.target_ongoing_requests": "9"}, "requests; set planner.ttft_s and planner.itl_s"),
        (
            {"prefill.autoscaling_config.aggregation_function": "max"},
            "prefill.autoscaling_config.aggregation_function$",
        ),
        ({"planner.dry_run": "true", "decode.autoscaling_config.metrics_interval_s": "9"}, "config.metrics_interval_s"),
        ({"planner.max_cost": "1"}, "the pools' min_replicas cost 2"),
    ],
)
def test_settings_that_contradict_the_planner_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AppConfig.model_validate({"planner.enabled": "true"} | arguments)


def test_every_field_of_ray_serves_scaling_is_the_planners_or_one_of_ours():
    ours = {"min_replicas", "initial_replicas", "max_replicas"}
    assert AutoscalingConfig.model_fields.keys() == PLANNERS_OWN.keys() | ours, "what a new one does is to be found out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planner.dry_run": "true"}, "leave out planner.dry_run, or set planner.enabled=true"),
        ({"planner.max_cost": "4", "planner.hold_s": "9"}, "leave out planner.max_cost and planner.hold_s, or"),
        ({"planner.enabled": "true", "planner.hold_s": "1e9"}, "planner.hold_s=1e9: .* less than or equal to 604800"),
        ({"planner.enabled": "true", "planner.hold_s": "0.1"}, "planner.hold_s=0.1: .* greater than or equal to 1"),
        ({"planner.enabled": "true", "planner.ttft_s": "1e9"}, "planner.ttft_s=1e9: .* less than or equal to 86400"),
        (
            {"planner.enabled": "true", "planner.itl_s": "1e-9"},
            "planner.itl_s=1e-9: .* greater than or equal to 0.0001",
        ),
        ({"planner.enabled": "true", "planner.decode_cost": "1e30"}, "planner.decode_cost=1e30: .* less than or equal"),
        (
            {"planner.enabled": "true", "planner.quantile": "0.9999999"},
            "planner.quantile=.* less than or equal to 0.9999",
        ),
        (
            {
                "planner.enabled": "true",
                "planner.max_cost": "2",
                "decode.initial_replicas": "6",
                "decode.max_replicas": "8",
            },
            "planner.max_cost=2: prefill.initial_replicas=1 and decode.initial_replicas=6 cost 7",
        ),
    ],
)
def test_settings_of_the_planner_that_could_do_nothing_or_harm_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AppConfig.model_validate(arguments)


def test_bounds_of_latencies_are_those_of_routing_also_without_the_planner():
    given = {"planner.ttft_s": "1", "planner.itl_s": "0.05", "planner.enabled": "false"}
    assert AppConfig.model_validate(given).planner.ttft_s == 1.0


def test_in_a_dry_run_how_serve_scales_can_be_set():
    given = {"planner.enabled": "true", "planner.dry_run": "true", "decode.autoscaling_config.upscaling_factor": "0.5"}
    options = AppConfig.model_validate(given).deployment_options("decode")
    assert options["autoscaling_config"]["upscaling_factor"] == 0.5


def test_a_count_that_was_set_between_two_plans_is_kept(observed):
    controller = Controller(hold_s=20.0)
    controller.run(30)
    controller.loop(1.0)
    assert observed[-1] == (controller.now_s, 0), "it has just planned"
    controller.targets["decode"] = 6
    assert controller.loop(0.4)["decode"] == 6
    assert observed[-1][0] < controller.now_s, "and not again"


def test_a_pool_that_is_not_scaled_by_its_policy_stops_the_planner_and_is_named(caplog):
    controller = Controller()
    controller.run(30)
    decode = controller.policies.pop("decode")
    with caplog.at_level("WARNING"):
        controller.run(15)
        controller.run(15, queued=40_000)
    assert controller.targets["prefill"] == 1
    assert [line for line in caplog.messages if "decode is not scaled by it" in line] == caplog.messages[:1]
    controller.policies["decode"] = decode
    controller.run(5, queued=40_000)
    assert controller.targets["prefill"] > 3


def test_calls_that_an_ingress_refuses_count_as_if_they_had_come(observed):
    controller = Controller()
    controller.run(30)
    ingress = IngressPolicy(False, controller.settings)
    context = controller.context("decode")
    replica = context.running_replicas[0]

    def refuse(count: float) -> None:
        context.raw_metrics = {REFUSED: {replica: [TimeStampedValue(controller.now_s, count)]}}
        assert ingress(context) == replica_queue_length_autoscaling_policy(context)

    refuse(1000)  # before the planner was there
    controller.loop(2.0)
    assert observed[-1] == (controller.now_s, 0)
    refuse(1005)
    controller.loop(2.0)
    assert observed[-1] == (controller.now_s, 5)
    controller.loop(2.0)
    assert observed[-1] == (controller.now_s, 0), "each counts once"
    another = ReplicaID("late", replica.deployment_id)
    context.raw_metrics = {REFUSED: {name: [TimeStampedValue(controller.now_s, 1005)] for name in (replica, another)}}
    ingress(context)
    controller.loop(2.0)
    assert observed[-1] == (controller.now_s, 0), "of one that is told of late it is past as well"


def test_what_is_told_to_the_planner_is_a_second_old_at_most():
    config = AppConfig.model_validate({"planner.enabled": "true"})
    for deployment in ("prefill", "decode", "ingress"):
        assert config.deployment_options(deployment)["autoscaling_config"]["metrics_interval_s"] == 1.0


def test_a_controller_that_stood_still_for_a_while_is_no_pool_that_is_not_scaled(caplog):
    controller = Controller()
    controller.run(5)
    with caplog.at_level("WARNING"):
        controller.loop(60.0)
    assert caplog.messages == []


def test_a_pool_whose_first_replica_still_starts_is_not_called_one_that_is_not_scaled(caplog):
    controller = Controller()
    controller.stats["decode"].clear()
    controller.loop()
    decode = controller.policies.pop("decode")  # Serve asks it no more once requests wait, until a replica is there
    with caplog.at_level("WARNING"):
        controller.run(60)
        controller.stats["decode"].append(controller.engine())
        controller.policies["decode"] = decode
        controller.run(5, queued=40_000)
    assert caplog.messages == [] and controller.targets["prefill"] > 3


def test_a_pool_that_was_never_scaled_by_its_policy_is_named(caplog):
    controller = Controller()
    del controller.policies["decode"]
    with caplog.at_level("WARNING"):
        controller.run(30)
    assert len(caplog.messages) == 1 and "decode is not scaled by it" in caplog.messages[0]
