"""What the planner does beyond counts of replicas: decode replicas that compute prompts, and no prefill replica."""

from dataclasses import dataclass

import pytest
from ray.serve.config import AutoscalingConfig

from app.arguments import ConfigError
from app.config import AppConfig
from tests.deployments.controller import Controller


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
    controller.run(6, queued=40_000)
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
    ],
)
def test_no_prefill_replica_is_refused_where_nobody_would_start_one_or_know(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AppConfig.model_validate(NO_PREFILL | arguments)
