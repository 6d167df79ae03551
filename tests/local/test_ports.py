"""Ports that nobody has, nor will be given."""

import socket
from pathlib import Path

import pytest

from app import ports
from app.ports import HOST, free_ports, why_not


def test_ports_differ_can_be_had_and_are_none_that_the_system_gives() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not given.exists():
        pytest.skip("the system does not say which ports it gives")
    least = int(given.read_text().split()[0])
    found = [port for _ in range(50) for port in free_ports(4)]
    assert all(20_000 <= port < least for port in found)
    assert all(len(set(found[start : start + 4])) == 4 for start in range(0, 200, 4))
    assert [why_not(port) for port in found[-4:]] == [None] * 4


def test_a_port_that_somebody_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        (free,) = free_ports(1)
        monkeypatch.setattr(ports, "_not_given", lambda _: (taken.getsockname()[1], free))
        assert free_ports(1) == [free]


@pytest.mark.parametrize("text", [None, "", "many few", "1024\t65535", "20000 65535"])
def test_where_the_system_leaves_none_it_is_asked_for_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "range").write_text(text)
    monkeypatch.setattr(ports, "_GIVEN", tmp_path / "range")
    assert len(set(free_ports(3))) == 3
