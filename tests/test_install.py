"""`.ci/install` in an environment whose programs only note what they were called with."""

import os
import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[1] / ".ci" / "install"
SETTINGS = r"""
:env:.find-links='/wheels /more'
global.extra-index-url='file:///a file:///b'
global.find-links='/other'
install.index-url='https://packages.example/simple'
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an environment with uv, whose answers are in files beside its programs."""
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "settings").write_text(SETTINGS)
    python = f'#!/bin/bash\necho "$@" >> {tmp_path}/python\n[[ "$*" != *"config list" ]] || cat {tmp_path}/settings\n'
    uv = f'#!/bin/bash\n(echo "$@"; env) > {tmp_path}/uv\ntest ! -e {tmp_path}/fails\n'
    for name, text in {"python": python, "uv": uv}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def install(folder: Path, *arguments: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    subprocess.run([INSTALL, folder / "env", *arguments], check=True, env=clean)


def test_uv_is_told_where_pip_looks_for_packages_with_the_environment_before_files(folder: Path) -> None:
    install(folder, "--no-deps", "a-model")
    arguments, *environment = (folder / "uv").read_text().splitlines()
    assert arguments == f"pip install -q --python {folder}/env/bin/python --no-deps a-model"
    assert {line for line in environment if line.startswith("UV_")} == {
        "UV_DEFAULT_INDEX=https://packages.example/simple",
        "UV_FIND_LINKS=/wheels,/more",
        "UV_INDEX=file:///a file:///b",
        "UV_INDEX_STRATEGY=unsafe-best-match",
    }
    assert "pip install" not in (folder / "python").read_text()


def test_pip_installs_what_uv_cannot(folder: Path) -> None:
    (folder / "fails").touch()
    install(folder, "-e", ".[dev]")
    installs = [line for line in (folder / "python").read_text().splitlines() if "pip install" in line]
    assert [line.split("--no-compile ")[1] for line in installs] == ["-e .[dev]"]


@pytest.mark.parametrize("compiles", [True, False])
def test_packages_are_compiled_unless_that_is_not_wanted(
    folder: Path, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE", "yes" if compiles else "no")
    install(folder, "a-package")
    assert ("-m compileall" in (folder / "python").read_text()) is compiles
