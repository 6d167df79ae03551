"""Half of the engines prefill and half decode, or all do both; what cannot be is refused before a model is written."""

import pytest
import torch

from tests.bench.two_gpus.bench_two_gpus import parse
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
