"""What `targets/cluster.yaml` deploys is what the application accepts, at every ratio."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from app.config import AppConfig
from load_tests.deployments import load_deployments

TARGETS = load_deployments(Path(__file__).parents[2] / "load_tests" / "targets" / "cluster.yaml")


@pytest.mark.parametrize("name", TARGETS.deployments)
def test_a_start_deploys_arguments_that_mean_what_its_numbers_say(name, tmp_path):
    tools = {"serve": 'test "$1" = shutdown || cp "$2" deployed.yaml', "ray": "echo no resource in the cluster"}
    for tool, does in tools.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / tool).chmod(0o755)
    target = TARGETS.deployments[name]
    numbers = {"NUM_PREFILL": str(target.num_prefill), "NUM_DECODE": str(target.num_decode)}
    environment = os.environ | numbers | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "Qwen/Qwen3-8B"}
    for command in (target.start, target.stop):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)
    (application,) = yaml.safe_load((tmp_path / "deployed.yaml").read_text())["applications"]
    config = AppConfig.model_validate(application["args"])
    assert application["import_path"] == "app:graph"
    assert config.model == "Qwen/Qwen3-8B"
    assert (config.mode == "colocated") == target.is_colocated
    assert (config.decode.min_replicas, config.decode.max_replicas) == (target.num_decode, target.num_decode)
    assert config.decode.num_gpus == 1
    if not target.is_colocated:
        assert (config.prefill.min_replicas, config.prefill.max_replicas) == (target.num_prefill, target.num_prefill)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deployed.yaml", "ray", "serve"], "it leaves nothing"
