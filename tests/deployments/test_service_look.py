"""How often Ray is asked for what the live page shows: seldom, and at once where something is seen to change."""

from collections.abc import Mapping

import pytest

from deployments import planner_log, service_look
from deployments.planner.shared import Decision
from deployments.service_look import CALM_PERIOD_S, PERIOD_S, ServiceLook
from deployments.telemetry.live import ServiceState

RUNNING = {"Decode": {"RUNNING": 2}, "Ingress": {"RUNNING": 1}}
STARTING = {"Decode": {"RUNNING": 1, "STARTING": 1}, "Ingress": {"RUNNING": 1}}


class Ray:
    """What it says, and at which seconds it was asked for the states."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked_s: list[float] = []
        self.states: Mapping[str, Mapping[str, int]] = RUNNING
        self.decisions: list[Decision] = []
        self.error: Exception | None = None

    def tell_states(self, _: str) -> Mapping[str, Mapping[str, int]]:
        self.asked_s.append(self.now_s)
        if self.error is not None:
            raise self.error
        return self.states

    def tell_decisions(self, _: str) -> list[Decision]:
        return list(self.decisions)

    async def pass_by(self, look: ServiceLook, seconds: float, seen: str = "all") -> ServiceState:
        """Somebody looks each second for so long; what he sees at the end."""
        told = await look(seen)
        for _ in range(int(seconds)):
            self.now_s += 1.0
            told = await look(seen)
        return told


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(service_look, "replica_states", ray.tell_states)
    monkeypatch.setattr(planner_log, "read", ray.tell_decisions)
    return ray


@pytest.fixture
def look(ray: Ray) -> ServiceLook:
    return ServiceLook(ServiceState("m", "colocated", "1", is_planned=True), "app", lambda: ray.now_s)


async def test_while_all_replicas_run_and_nothing_changes_states_are_asked_for_seldom(
    ray: Ray, look: ServiceLook
) -> None:
    told = await ray.pass_by(look, 60)
    assert told.states == {"decode": {"RUNNING": 2}} and told.num_ingresses == 1
    assert len(ray.asked_s) <= 1 + 60 / CALM_PERIOD_S


async def test_what_is_seen_to_change_is_asked_for_soon(ray: Ray, look: ServiceLook) -> None:
    await ray.pass_by(look, 30)
    num_asked, changed_s = len(ray.asked_s), ray.now_s
    ray.states = {"Decode": {"RUNNING": 1}}
    told = await ray.pass_by(look, PERIOD_S + 1, seen="one is gone")
    assert told.states == {"decode": {"RUNNING": 1}}
    assert ray.asked_s[num_asked:] and ray.asked_s[num_asked] <= changed_s + PERIOD_S + 1


async def test_while_a_replica_starts_or_the_planner_has_just_decided_they_are_asked_for_soon(
    ray: Ray, look: ServiceLook
) -> None:
    ray.states = STARTING
    await ray.pass_by(look, 30)
    assert len(ray.asked_s) >= 5
    ray.states = RUNNING
    await ray.pass_by(look, 10)
    num_asked = len(ray.asked_s)
    ray.decisions = [Decision(1.0, {"decode": 2}, {"decode": 3}, "because", True)]
    told = await ray.pass_by(look, 2 * PERIOD_S + 2)
    assert told.decisions == ray.decisions and len(ray.asked_s) > num_asked


async def test_what_ray_did_not_say_is_asked_for_again(ray: Ray, look: ServiceLook) -> None:
    ray.error = TimeoutError("busy")
    await ray.pass_by(look, 0)
    ray.error = None
    told = await ray.pass_by(look, PERIOD_S + 1)
    assert told.states == {"decode": {"RUNNING": 2}}
