"""The rules of `kvrelay-haproxy` against the template of the installed Ray."""

import re
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from ray.serve._private.haproxy import get_haproxy_binary
from ray.serve.config import HTTPOptions

from app.haproxy import (
    LOOPBACK_RULES,
    LOOPBACK_VARIABLE,
    REPLICA_KEEP_ALIVE_S,
    RULES,
    Rule,
    TemplateError,
    change,
    prepare,
)
from app.local import SERVE_SETTINGS, read_settings
from app.local_server import http_options
from deployments.messages import FinishReason
from tests.api.fakes import playing
from tests.haproxy.proxied import PROGRAM, api, free_port, proxied, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, free_port(), free_port())


def check(binary: Path, config: Path) -> list[str]:
    """Warnings about a configuration, which has to be valid."""
    checked = subprocess.run([binary, "-c", "-f", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    return re.findall(r"^\[WARNING\] +\(\d+\) : (.*)", checked.stderr, flags=re.MULTILINE)


def test_every_rule_finds_its_place_in_rays_template_and_haproxy_accepts_the_whole(config: Path) -> None:
    before = config.read_text()
    of_ray = check(Path(get_haproxy_binary()), config)
    assert check(PROGRAM, config) == of_ray, "no warning beside those that Ray's own has"
    after = config.read_text()
    for gone in ("splice-request", "text/plain lf-string", "/500.http"):
        assert gone in before and gone not in after
    assert "option abortonclose" in after
    assert not [name for name in config.parent.iterdir() if name.suffix == ".changed"]


def test_a_configuration_is_changed_once(config: Path) -> None:
    changed = change(config.read_text(), config.parent)
    assert change(changed, config.parent) == changed


def test_for_one_machine_alone_the_pages_of_haproxy_itself_listen_on_loopback(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOOPBACK_VARIABLE, "1")
    check(PROGRAM, config)
    addresses = re.findall(r"^\s*bind (\S+):\d+", config.read_text(), re.MULTILINE)
    assert addresses == ["127.0.0.1"] * 3


@pytest.mark.parametrize("rule", RULES + LOOPBACK_RULES, ids=lambda rule: rule.pattern[:40])
def test_a_template_of_ray_that_a_rule_does_not_fit_is_refused(
    config: Path, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOOPBACK_VARIABLE, "1")
    without = re.sub(rf"^[ \t]*{rule.pattern}[ \t]*\n", "", config.read_text(), flags=re.MULTILINE)
    config.write_text(without)
    with pytest.raises(TemplateError, match=re.escape(repr(rule.pattern))):
        prepare(config)
    assert config.read_text() == without


def test_a_template_of_ray_that_has_changed_ends_the_start_and_says_why(config: Path) -> None:
    config.write_text(config.read_text().replace("option splice-request", "option splice-auto"))
    started = subprocess.run([PROGRAM, "-c", "-f", config], capture_output=True, text=True)
    assert started.returncode == 1
    assert "has no 'option splice-request' now" in started.stderr


def test_clients_keep_idle_connections_for_seconds_and_replicas_theirs_for_hours(config: Path) -> None:
    check(PROGRAM, config)
    (of_clients,) = re.findall(r"^\s*timeout http-keep-alive (\d+)s$", config.read_text(), re.MULTILINE)
    assert int(of_clients) <= 120
    files = [yaml.safe_load((ROOT / "app" / name).read_text()) for name in ("serve.yaml", "serve.cluster.yaml")]
    for options in (http_options(8000), *(file["http_options"] for file in files)):
        assert HTTPOptions(**options).keep_alive_timeout_s == REPLICA_KEEP_ALIVE_S >= 3600


def test_serve_env_bounds_the_time_in_which_a_client_does_nothing() -> None:
    assert 0 < int(read_settings(SERVE_SETTINGS)["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) <= 300


async def test_the_process_that_ray_starts_becomes_haproxy(tmp_path: Path) -> None:
    async with proxied(api(playing("a", FinishReason.LENGTH)), tmp_path) as proxy:
        info = await proxy.ask("show info")
        assert f"Pid: {proxy.pid}\n" in info
        assert psutil.Process(proxy.pid).net_connections("udp") == []
        # Ray finds its HAProxy among all processes by the path of the configuration.
        assert str(tmp_path / "haproxy.cfg") in psutil.Process(proxy.pid).cmdline()
