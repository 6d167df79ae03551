"""Clients that people bring, unmodified, on a real service: `tests/clients/` has a program for each.

One process for those of Python and one for those of Node, side by side: most of their time is start, and the engine
batches what they ask. Where the model is too weak to do as it is told, a grammar makes it.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import openai_client
from tests.clients.wanted import TIMEOUT_S
from tests.e2e.conftest import MODEL_NAME, Service

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "clients"
PYTHON, NODE_MODULES = ROOT / ".venv-clients" / "bin" / "python", PROGRAMS / "node" / "node_modules"

OF_PYTHON = [path.stem.removesuffix("_client") for path in sorted(PROGRAMS.glob("*_client.py"))]
OF_NODE = [path.stem.removesuffix("_client") for path in sorted(PROGRAMS.glob("node/*_client.mjs"))]
RUNTIMES = {
    "python": (PYTHON, [str(PYTHON), "-m", "tests.clients"], OF_PYTHON),
    "node": (NODE_MODULES, ["node", str(PROGRAMS / "node" / "main.mjs")], OF_NODE),
}


@pytest.fixture(scope="module")
def running(services: dict[str, Service]) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    url = f"{services['disaggregated'].url}/v1"
    started = {
        runtime: subprocess.Popen([*command, url, MODEL_NAME, *names], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for runtime, (needed, command, names) in RUNTIMES.items()
        if needed.exists()
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def test_openais_client_in_its_newest_release(
    running: dict[str, "subprocess.Popen[str]"], services: dict[str, Service]
) -> None:
    """Which llama-index does not let into the environment of the others."""
    openai_client.talk(f"{services['disaggregated'].url}/v1", MODEL_NAME)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_clients_get_what_they_ask_for(running: dict[str, "subprocess.Popen[str]"], runtime: str) -> None:
    if runtime not in running:
        pytest.skip("not installed: `make test` does it, where npm is there for those of Node")
    output, _ = running[runtime].communicate(timeout=TIMEOUT_S)
    said = [json.loads(line) for line in output.splitlines() if line.startswith('{"client":')]
    errors = {line["client"]: line["error"] for line in said}
    *_, names = RUNTIMES[runtime]
    assert errors == dict.fromkeys(names), "\n".join(error for error in errors.values() if error)
