"""Deployments files, and the start and stop of what they name, with a web server in place of a service."""

import sys
import urllib.request
from pathlib import Path

import pytest

from load_tests import deployments
from load_tests.deployments import Deployment, DeploymentError, load_deployments, running

TARGETS = Path(__file__).parents[2] / "load_tests" / "targets"


@pytest.mark.parametrize("path", sorted(TARGETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_file_compares_one_colocated_deployment_with_every_ratio(path):
    found = load_deployments(path).deployments.values()
    (colocated,) = [one for one in found if one.is_colocated]
    split = sorted((one.num_prefill, one.num_decode) for one in found if not one.is_colocated)
    total = colocated.num_decode
    assert split == [(number, total - number) for number in range(1, total)]


def test_different_numbers_of_engines_are_refused(tmp_path):
    path = tmp_path / "targets.yaml"
    path.write_text(
        "deployments:\n  a: {num_prefill: 0, num_decode: 2, start: x, stop: x}\n"
        "  b: {num_prefill: 1, num_decode: 2, start: x, stop: x}\n"
    )
    with pytest.raises(DeploymentError, match=r"engines differ \(a 2, b 3\)"):
        load_deployments(path)


@pytest.mark.parametrize("text", ["deployments: {}", "deployments: {a: {start: x}}", "a: [", ""])
def test_a_file_that_says_too_little_is_refused_by_its_path(tmp_path, text):
    path = tmp_path / "targets.yaml"
    path.write_text(text)
    with pytest.raises(DeploymentError, match=r"targets\.yaml"):
        load_deployments(path)


def web_server(folder: Path, port: int) -> Deployment:
    (folder / "health").write_text("ok")
    start = f"{sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {folder} & echo $! > {folder}/pid"
    return Deployment(
        num_prefill=1,
        num_decode=2,
        start=start,
        stop=f"kill -9 $(cat {folder}/pid); while kill -0 $(cat {folder}/pid); do sleep 0.1; done",
    )


def test_a_deployment_answers_inside_and_is_gone_after_even_on_failure(tmp_path, unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    with (
        pytest.raises(KeyError),
        running("web", web_server(tmp_path, unused_tcp_port), url, 30, tmp_path / "log"),
    ):
        with urllib.request.urlopen(f"{url}/health") as response:
            assert response.read() == b"ok"
        raise KeyError
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health")


def test_commands_know_the_numbers_of_engines(tmp_path):
    deployment = Deployment(num_prefill=1, num_decode=3, start="exit 3", stop="echo $NUM_PREFILL to $NUM_DECODE")
    with (
        pytest.raises(DeploymentError, match="web: start: ended with status 3"),
        running("web", deployment, "http://127.0.0.1:1", 30, tmp_path / "log"),
    ):
        pass
    assert (tmp_path / "log").read_text().splitlines()[-1] == "1 to 3", "it was stopped all the same"


def test_one_that_never_answers_is_an_error_with_its_log(tmp_path):
    deployment = Deployment(num_prefill=0, num_decode=1, start="true", stop="true")
    with (
        pytest.raises(DeploymentError, match=r"web: http://127\.0\.0\.1:1/health: .* after 0 s \(log: "),
        running("web", deployment, "http://127.0.0.1:1", 0, tmp_path / "log"),
    ):
        pass


def test_another_service_in_its_place_is_an_error_and_nothing_is_started(tmp_path, unused_tcp_port, monkeypatch):
    monkeypatch.setattr(deployments, "_FREE_TIMEOUT_S", 0.2)
    url = f"http://127.0.0.1:{unused_tcp_port}"
    second = Deployment(num_prefill=0, num_decode=3, start=f"touch {tmp_path}/started", stop="true")
    with (
        running("web", web_server(tmp_path, unused_tcp_port), url, 30, tmp_path / "log"),
        pytest.raises(DeploymentError, match=r"second: a service answers at .* before this one was started"),
        running("second", second, url, 30, tmp_path / "log"),
    ):
        pass
    assert not (tmp_path / "started").exists()
