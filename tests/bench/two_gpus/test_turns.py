"""Half of the engines prefill and half decode, or all do both; what cannot be is refused before a model is written."""

from pathlib import Path

import pytest
import torch

from load_tests.scenario import load_scenario
from tests.bench.two_gpus import beside_vllm
from tests.bench.two_gpus.bench_two_gpus import parse
from tests.bench.two_gpus.plays import plays_of
from tests.bench.two_gpus.turns import Turn


def replicas(turn: Turn) -> dict[str, str]:
    arguments = dict(argument.split("=", 1) for argument in turn.arguments(512))
    return {name: value for name, value in arguments.items() if "replicas" in name}


def test_four_engines_are_two_of_each_kind_or_four_of_one() -> None:
    of_two = {"min_replicas": "2", "max_replicas": "2"}
    split = {f"{pool}.{name}": value for pool in ("prefill", "decode") for name, value in of_two.items()}
    assert replicas(Turn("disaggregated", 4)) == replicas(Turn("disaggregated, NCCL", 4)) == split
    assert replicas(Turn("colocated, 2048", 4)) == {"decode.min_replicas": "4", "decode.max_replicas": "4"}
    assert set(replicas(Turn("disaggregated")).values()) == {"1"}


@pytest.mark.parametrize(
    ("arguments", "num_gpus", "refusal"),
    [
        (["--gpus", "3"], 4, "--gpus 3: an even number"),
        (["--gpus", "0"], 4, "--gpus 0: an even number"),
        (["--gpus", "4"], 2, "--gpus 4: this machine has 2"),
        (["--gpus", "4", "--kill"], 4, "--kill with --gpus 4"),
    ],
)
def test_what_cannot_be_is_refused(arguments, num_gpus, refusal, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(SystemExit):
        parse(arguments)
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize("num_gpus", [0, 1, 4])
def test_engines_share_what_there_is_of_one_gpu_or_none(num_gpus, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert parse(["--gpus", "4"]).gpus == 4


def test_one_gpu_has_one_colocated_engine_and_half_of_the_streams() -> None:
    assert beside_vllm.parse(["ours", "--gpus", "1"]).turns == "colocated, 2048"
    assert beside_vllm.parse(["ours"]).turns == "disaggregated;colocated, 2048"
    assert replicas(Turn("colocated, 2048", 1)) == {"decode.min_replicas": "1", "decode.max_replicas": "1"}
    scenario = load_scenario(str(Path(beside_vllm.__file__).with_name("chat.yaml")))
    streams = [len({request.session for request in plays_of(scenario, 0, load)[1].requests}) for load in (1.0, 0.5)]
    assert streams == [64, 32]


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["ours", "--gpus", "3"], "--gpus 3: 1 or an even number"),
        (["plan", "--gpus", "0"], "--gpus 0: 1 or an even number"),
        (["ours", "--gpus", "1", "--turns", "disaggregated"], "one engine cannot be split"),
    ],
)
def test_what_cannot_be_played_is_refused(arguments, refusal, capsys) -> None:
    with pytest.raises(SystemExit):
        beside_vllm.parse(arguments)
    assert refusal in capsys.readouterr().err
