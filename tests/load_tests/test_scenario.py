"""Scenario files: those that are shipped load, and what is wrong in one is said."""

import pytest

from load_tests.scenario import FOLDER, ScenarioError, load_scenario

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


CHAT = "classes: {chat: {arrivals: {poisson_per_s: 1}, prompt_tokens: 10, output_tokens: 5}}"


def test_every_kind_of_traffic_is_shipped():
    assert {"chat", "rag", "long-context", "mixed", "burst", "agentic", "trace"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_scenario_loads(name):
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.class_names()


def test_a_file_is_named_after_itself_and_fields_can_be_replaced(tmp_path):
    scenario = load_scenario(write(tmp_path, f"description: x\n{CHAT}"), {"duration_s": 7})
    assert (scenario.name, scenario.duration_s) == ("mine", 7)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ScenarioError, match=r"mixxed: no such scenario; .*\bmixed\b"):
        load_scenario("mixxed")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("description: x", "nothing to send"),
        ("- a list", "holds a list"),
        ("a: [", "cannot be read"),
        (f"description: x\nduration_s: -1\n{CHAT}", r"duration_s: .*greater than 0 \(it is -1\)"),
        (f"description: x\ndurations: 1\n{CHAT}", "durations: Extra inputs"),
        (f"description: x\nslo: {{ttft_s: {{long: 1}}}}\n{CHAT}", "no class is called long"),
        (f"description: x\ntoken_ids: [9, 3]\n{CHAT}", r"\[9, 3\] is not \[least, most\]"),
        (f"description: x\n{CHAT.replace('poisson_per_s: 1', '')}", "exactly one of poisson_per_s"),
        (f"description: x\n{CHAT.replace('1}', '1, streams: 2}')}", "exactly one of poisson_per_s"),
        (f"description: x\n{CHAT.replace('prompt_tokens: 10', 'prompt_tokens: 0')}", "prompt_tokens"),
        (f"description: x\n{CHAT.replace('prompt_tokens: 10', 'prompt_tokens: [20, 10]')}", "upside down"),
        (
            f"description: x\n{CHAT.replace('poisson_per_s: 1', 'streams: 1').replace('output', 'turns: 2, output')}",
            "streams send independent requests",
        ),
    ],
)
def test_what_a_file_may_not_say_is_refused_by_name(tmp_path, text, complaint):
    with pytest.raises(ScenarioError, match=complaint):
        load_scenario(write(tmp_path, text))


def test_a_trace_is_found_beside_the_scenario(tmp_path):
    scenario = load_scenario(write(tmp_path, "description: x\ntrace: {path: arrivals.csv}"))
    assert scenario.trace is not None
    assert scenario.trace.path == tmp_path / "arrivals.csv"
