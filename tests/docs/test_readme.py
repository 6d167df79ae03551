"""The README can be read in five minutes, and its commands are those that there are. Nothing is served or measured."""

import json
import re
import shlex
import subprocess
import sys

import pytest

import app.local
import load_tests.advise
import load_tests.run
from app.config import AppConfig
from app.local import parse_arguments
from deployments.api.openai import ChatBody
from tests.docs.pages import ROOT, commands, spans, targets
from tests.docs.plot import MEASURED

README = (ROOT / "README.md").read_text()
MAX_LINES = 180
COMMANDS = commands(README)
MAKE_COMMANDS = sorted(
    {*(line for line in COMMANDS if line.startswith("make ")), *re.findall(r"`(make [a-z-]+)`", README)}
)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MAX_LINES


def test_every_benchmark_is_listed():
    benchmarks = {target for target in targets() if target.startswith("bench-")}
    assert benchmarks == set(re.findall(r"`make (bench-[a-z-]+)`", README))


@pytest.mark.parametrize("command", MAKE_COMMANDS)
def test_make_knows_the_command_and_runs_a_program_that_exists(command):
    recipe = run(*shlex.split(command), "-n")
    modules = re.findall(r"python -m ((?:app|tests|load_tests)[\w.]*)", recipe)
    files = [f"{module.replace('.', '/')}.py" for module in modules] + re.findall(r"python (tests/\S+\.py)", recipe)
    assert files or "python -m pytest" in recipe or "python -m app.local" in recipe
    assert [path for path in files if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("target", sorted(target for target in targets() if target.startswith("bench-")))
def test_a_benchmark_takes_the_arguments_that_make_passes_on(target):
    recipe = run("make", "-n", target, "ARGS=--not-an-option")
    (line,) = [line for line in recipe.splitlines() if "--not-an-option" in line]
    program = re.search(r"python (?:-m )?(\S+) --not-an-option", line)
    assert program
    path = program[1] if program[1].endswith(".py") else f"{program[1].replace('.', '/')}.py"
    assert "parse_args(" in (ROOT / path).read_text()


def settings_of(command: str) -> list[str]:
    """`key=value` pairs that a command gives the application."""
    words = shlex.split(command)
    if words[0] == "make":
        given = dict(word.split("=", 1) for word in words[2:])
        return shlex.split(given.get("ARGS", "")) + ([f"model={given['MODEL']}"] if "MODEL" in given else [])
    return words[3:] if words[:3] == ["serve", "run", "app:graph"] else []


@pytest.mark.parametrize("command", [command for command in COMMANDS if settings_of(command)])
def test_the_application_takes_the_settings_of_a_command(command):
    parse_arguments(settings_of(command))


def test_the_settings_of_ray_serve_are_read_by_a_shell_as_the_readme_says():
    (command,) = [command for command in COMMANDS if "serve.env" in command]
    told = run("bash", "-euc", f"{command}; exec env")
    settings = [line for line in (ROOT / "app" / "serve.env").read_text().splitlines() if re.match(r"\w+=", line)]
    assert settings
    assert {setting.partition("=")[0] for setting in settings} <= {line.partition("=")[0] for line in told.splitlines()}


def test_files_that_commands_are_given_exist():
    named = {path for command in COMMANDS for path in re.findall(r"[\w./]+\.yaml", command.replace("~/kvrelay/", ""))}
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_scenarios_of_the_commands_exist():
    named = set(re.findall(r"SCENARIO=(\S+)", "\n".join(COMMANDS)))
    assert named
    assert [name for name in named if not (ROOT / "load_tests" / "scenarios" / f"{name}.yaml").exists()] == []


def test_the_request_of_the_quick_start_is_one_that_the_default_model_takes():
    (curl,) = [command for command in COMMANDS if command.startswith("curl ")]
    words = shlex.split(curl)
    body = ChatBody.model_validate(json.loads(words[words.index("-d") + 1]))
    assert body.model == AppConfig().served_model_name
    assert words[1].endswith("/v1/chat/completions")


def test_the_listing_of_settings_has_those_that_the_readme_names():
    listing = run(sys.executable, "-m", "app.config")
    assert "min_remote_prefill_tokens" in spans(README)
    assert "min_remote_prefill_tokens" in listing


@pytest.mark.parametrize(
    "main", [app.local.main, load_tests.run.main, load_tests.advise.main], ids=lambda m: m.__module__
)
def test_programs_behind_the_commands_say_what_they_take(main, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [main.__module__, "--help"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_figures_of_the_results_are_those_of_the_measured_page():
    measured = set(_figures(MEASURED.read_text()))
    assert sorted(set(_figures(section("Results"))) - measured) == []


def _figures(text: str) -> list[str]:
    """Numbers that are told exactly: with a point, a comma, or three digits."""
    return re.findall(r"(?<![\w.])\d+\.\d+|\d{1,3}(?:,\d{3})+|(?<![\w.,])\d{3,}(?![\w.,]\d)", text)
