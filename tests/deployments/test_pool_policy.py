"""Ray Serve follows the planner: what its policies are told, and what they answer."""

import re
from dataclasses import dataclass
from itertools import count, pairwise

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from app.arguments import ConfigError
from app.config import AppConfig
from deployments import pool_policy
from deployments.engine.stats import EngineStats
from deployments.planner import shared
from deployments.planner.observer import Observer
from deployments.planner.settings import PlannerSettings
from deployments.planner.wire import REFUSED, of_numbers, to_numbers
from deployments.pool_policy import IngressPolicy, PoolPolicy, view_of

_apps = count()


class Controller:
    """Calls both policies as Serve's controller does, each loop with what the replicas told last."""

    def __init__(self, **settings) -> None:
        self.app = f"app{next(_apps)}"
        self.settings = {"enabled": True, "ttft_s": 1.0, "itl_s": 0.05, "start_s": 1.0} | settings
        self.policies = {pool: PoolPolicy(pool, False, self.settings) for pool in ("decode", "prefill")}
        self.stats = {pool: [self.engine()] for pool in self.policies}
        self.targets = dict.fromkeys(self.policies, 1)
        self.bounds = dict.fromkeys(self.policies, (1, 10))
        self.now_s = 1000.0

    def engine(self) -> EngineStats:
        return EngineStats(steps=100, max_num_batched_tokens=1000, max_num_seqs=64, num_blocks=100, block_size=16)

    def context(self, pool: str) -> AutoscalingContext:
        deployment = DeploymentID(name=pool, app_name=self.app)
        ids = [ReplicaID(f"{pool}{i}", deployment) for i in range(len(self.stats[pool]))]
        raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        for replica, stats in zip(ids, self.stats[pool], strict=True):
            for name, value in to_numbers(stats).items():
                raw.setdefault(name, {})[replica] = [TimeStampedValue(self.now_s, value)]
        least, most = self.bounds[pool]
        return AutoscalingContext(
            deployment_id=deployment, deployment_name=pool, app_name=self.app, current_num_replicas=len(ids),
            target_num_replicas=self.targets[pool], running_replicas=ids, total_num_requests=0.0,
            total_queued_requests=0.0, aggregated_metrics=None, raw_metrics=raw, capacity_adjusted_min_replicas=least,
            capacity_adjusted_max_replicas=most, policy_state={}, last_scale_up_time=None, last_scale_down_time=None,
            current_time=self.now_s, config=AutoscalingConfig(min_replicas=least, max_replicas=most),
        )  # fmt: skip

    def loop(self, seconds=0.5) -> dict[str, int]:
        self.now_s += seconds
        for pool, policy in self.policies.items():
            answer, state = policy(self.context(pool))
            assert state == {}
            least, most = self.bounds[pool]
            self.targets[pool] = min(max(int(answer), least), most)  # as Serve does
        return self.targets

    def run(self, seconds: float, tokens=500, queued=0) -> dict[str, int]:
        """Prompts are computed each second."""
        for _ in range(int(seconds)):
            for engine in self.stats["prefill"]:
                engine.prompt_tokens += tokens
                engine.prefill_steps += 1
                engine.prefill_s += tokens / 5000
                engine.num_queued_prompt_tokens = queued
            self.loop()
            self.loop()
        return self.targets


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


def test_prompts_that_wait_add_prefill_replicas_within_two_seconds():
    controller = Controller()
    controller.run(30)
    assert controller.targets == {"decode": 1, "prefill": 1}
    controller.run(2, queued=40_000)
    assert controller.targets["prefill"] > 3 and controller.targets["decode"] == 1


def test_both_policies_share_one_planner_and_one_observation_each_second(observed):
    controller = Controller()
    controller.run(1)
    before = observed.copy()
    controller.loop(0.4)
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


def test_bounds_that_change_are_kept_at_once():
    controller = Controller()
    controller.run(5)
    controller.bounds["decode"] = (4, 8)
    assert controller.loop()["decode"] == 4


def test_other_settings_begin_anew():
    controller = Controller()
    settings = PlannerSettings.model_validate(controller.settings)
    planner = shared.planner_of(controller.app, settings, False)
    assert shared.planner_of(controller.app, settings, False) is planner
    assert shared.planner_of(controller.app, settings.model_copy(update={"ttft_s": 9.0}), False) is not planner


def test_each_change_is_kept_with_its_reason_and_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(pool_policy, "publish", lambda app, decisions: told.append((app, decisions)))
    controller = Controller()
    controller.run(30)
    ((app, (first,)),) = told
    assert app == controller.app, "it said what it wants, which was what there was"
    assert (first.before, first.targets, first.is_dry_run) == (first.targets, {"decode": 1, "prefill": 1}, False)
    controller.run(2, queued=40_000)
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
        ({"planner.max_cost": "1"}, "the pools' min_replicas cost 2"),
    ],
)
def test_settings_that_contradict_the_planner_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AppConfig.model_validate({"planner.enabled": "true"} | arguments)


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
    controller.loop(1.0)
    assert observed[-1] == (controller.now_s, 0)
    refuse(1005)
    controller.loop(1.0)
    assert observed[-1] == (controller.now_s, 5)
    controller.loop(1.0)
    assert observed[-1] == (controller.now_s, 0), "each counts once"


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


@dataclass(frozen=True)
class Engine:
    """An engine's actor, as far as it is told its role."""

    name: str
    told: list[tuple[str, bool]]

    @property
    def take_role(self) -> "Engine":
        return self

    def remote(self, is_flipped: bool) -> None:
        self.told.append((self.name, is_flipped))


@pytest.fixture
def ordered(monkeypatch) -> list[tuple[str, bool]]:
    """What decode replicas were told, in turn: whether they are to compute prompts."""
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr("ray.get_actor", lambda name, namespace: Engine(name, told))
    return told


def short_of_prefill(**settings) -> Controller:
    """One prefill replica and no more; two of decode, of which one is idle."""
    controller = Controller(hold_s=5.0, flip=True, **settings)
    controller.bounds = {"prefill": (1, 1), "decode": (2, 2)}
    controller.targets["decode"] = 2
    controller.stats["decode"].append(controller.engine())
    controller.stats["decode"][0].num_running = 3
    controller.run(20)
    return controller


def test_an_idle_decode_replica_is_told_its_role_until_it_says_so_and_later_to_decode_again(ordered):
    controller = short_of_prefill()
    controller.run(4, queued=40_000)
    assert len(ordered) > 1 and set(ordered) == {("decode1", True)}, "again, for it has not said so yet"
    controller.stats["decode"][1].is_flipped = True
    ordered.clear()
    controller.run(5, queued=40_000)
    assert ordered == [] and controller.targets == {"decode": 2, "prefill": 1}
    controller.run(300, tokens=0)
    assert ordered[0] == ("decode1", False)


def test_a_controller_that_starts_anew_learns_the_roles_from_the_replicas(ordered):
    controller = short_of_prefill()
    controller.run(2, queued=40_000)
    controller.stats["decode"][1].is_flipped = True
    controller.app = "restarted"
    ordered.clear()
    controller.run(5, queued=40_000)
    assert ordered == []


def test_a_replica_that_takes_the_place_of_a_flipped_one_decodes_until_it_is_told(ordered):
    controller = short_of_prefill()
    controller.run(2, queued=40_000)
    controller.stats["decode"][1].is_flipped = True
    controller.run(5, queued=40_000)
    ordered.clear()
    controller.stats["decode"].pop()
    controller.run(3, queued=40_000)
    assert ordered == [], "the one that is left decodes"


def test_a_dry_run_tells_no_replica_anything(ordered, caplog):
    controller = short_of_prefill(dry_run=True)
    with caplog.at_level("INFO"):
        for _ in range(10):
            controller.targets = {"decode": 2, "prefill": 1}
            controller.run(1, queued=40_000)
    lines = [line for line in caplog.messages if "0 to 1 of decode compute prompts" in line]
    assert ordered == [] and lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planner.enabled": "false"}, "planner.enabled=false"),
        ({"mode": "colocated"}, "mode=colocated has no prefill pool"),
        ({"routing.by_prefix": "false"}, "routing.by_prefix=false"),
        ({"decode.max_replicas": "1"}, "decode.max_replicas=1"),
        ({"decode.engine.hands_over": "false"}, "hands_over=false"),
        ({"engine.hands_over": "false"}, "hands_over=false"),
    ],
)
def test_flips_are_refused_where_they_could_not_help(arguments, message):
    fits = {"planner.enabled": "true", "planner.flip": "true", "decode.max_replicas": "2"}
    assert AppConfig.model_validate(fits).engine_config("decode").hands_over
    with pytest.raises(ConfigError, match=message):
        AppConfig.model_validate(fits | arguments)


def test_an_engine_that_has_just_gone_is_told_nothing(monkeypatch):
    def find(name, namespace):
        raise ValueError(f"Failed to look up actor with name {name!r}")

    monkeypatch.setattr("ray.get_actor", find)
    controller = short_of_prefill()
    controller.run(2, queued=40_000)
    assert controller.targets == {"decode": 2, "prefill": 1}


NO_PREFILL = {"prefill.min_replicas": "0", "planner.enabled": "true", "parity_check": "false"}


def test_prefill_may_have_no_replica_where_the_planner_starts_one(caplog):
    config = AppConfig.model_validate(NO_PREFILL)
    assert AutoscalingConfig(**config.deployment_options("prefill")["autoscaling_config"]).min_replicas == 0
    controller = Controller(hold_s=5.0)
    controller.bounds["prefill"] = (0, 4)
    controller.run(10)
    assert controller.targets == {"decode": 1, "prefill": 1}
    controller.run(900, tokens=0)
    assert controller.targets == {"decode": 1, "prefill": 0}
    controller.stats["prefill"] = []
    for _ in range(5):
        decode = controller.stats["decode"][0]
        decode.prompt_tokens, decode.prefill_steps, decode.prefill_s = (
            decode.prompt_tokens + 2500, decode.prefill_steps + 3, decode.prefill_s + 0.5,
        )  # fmt: skip
        controller.run(1)
    assert controller.targets == {"decode": 1, "prefill": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planner.enabled": "false"}, "planner.enabled=true"),
        ({"planner.dry_run": "true"}, "planner.dry_run=false"),
        ({"routing.by_prefix": "false"}, "routing.by_prefix=true"),
        ({"parity_check": "true"}, "parity_check=false"),
        ({"decode.min_replicas": "0"}, "decode.min_replicas=0: must be at least 1"),
    ],
)
def test_no_prefill_replica_is_refused_where_nobody_would_start_one_or_know(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AppConfig.model_validate(NO_PREFILL | arguments)
