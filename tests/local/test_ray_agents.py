"""Ray's agents get their ports before they start. No Ray runs."""

import inspect
from collections.abc import Callable

import pytest
from ray._private import node, services

from app.ray_agents import PORTS, choose_ports


def test_a_raylet_finds_the_ports_of_its_agents_where_it_looks_and_agents_are_told_them(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, object] = {}

    def start_raylet(
        address: str,
        node_id: str,
        session_dir: str,
        metrics_agent_port: int | None = None,
        runtime_env_agent_port: int | None = None,
        metrics_export_port: int | None = None,
        dashboard_agent_listen_port: int | None = None,
    ) -> str:
        told.update(locals())
        return "started"

    monkeypatch.setattr(services, "start_raylet", start_raylet)
    choose_ports()
    node_id = "ab" * 28
    start: Callable[..., object] = services.start_raylet
    assert start("address", node_id, str(tmp_path), metrics_export_port=0) == "started"
    for parameter, file_name in PORTS.items():
        assert (tmp_path / f"{file_name}_{node_id}").read_text() == str(told[parameter])
    assert len({told[parameter] for parameter in PORTS}) == len(PORTS)


def test_ray_starts_raylets_as_it_is_expected_to() -> None:
    parameters = inspect.signature(services.start_raylet).parameters
    assert {*PORTS, "session_dir", "node_id"} <= set(parameters)
    assert "ray._private.services.start_raylet(" in inspect.getsource(node)
