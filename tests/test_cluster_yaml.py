"""The cluster file and the application's file for it: valid, and agreeing on labels, resources and room."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private import node, ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private import constants
from ray.serve.schema import ServeDeploySchema

from app.config import AppConfig
from app.local import SERVE_SETTINGS, read_settings
from tests.cluster_nodes import POOLS, demand, nodes_started_for

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
# Knows the settings of Ray itself; those of Serve are in its Python.
GCS_SERVER = "core/src/ray/gcs/gcs_server"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    return prepared


@pytest.fixture(scope="module")
def config() -> AppConfig:
    return read_app("serve.cluster.yaml")


def read_app(name: str) -> AppConfig:
    deploy = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "app" / name).read_text()))
    assert deploy.applications[0].import_path == "app:graph"
    return AppConfig.model_validate(deploy.applications[0].args)


def test_ray_accepts_the_cluster_file(cluster):
    validate_config(cluster)


def test_ray_refuses_a_cluster_file_with_an_unknown_field(cluster):
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(cluster | {"idle_timeout": 5})


@pytest.mark.parametrize("name", ["serve.yaml", "serve.cluster.yaml"])
def test_serve_and_the_application_accept_the_application_files(name):
    assert read_app(name).mode == "disaggregated"


def test_the_plain_application_file_needs_no_more_than_two_cores_and_no_gpu():
    config = read_app("serve.yaml")
    assert config.max_num_cpus() <= 2
    assert all("GPU" not in demand(config, pool) for pool in POOLS)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_pinned_to_the_type_of_node_of_its_name_and_to_no_other(cluster, config, pool):
    (selector,) = {
        tuple(bundle.items()) for bundle in config.deployment_options(pool)["placement_group_bundle_label_selector"]
    }
    admitted = [
        name for name, type_ in cluster["available_node_types"].items() if set(selector) <= set(type_["labels"].items())
    ]
    assert admitted == [pool]


@pytest.mark.parametrize("pool", POOLS)
def test_the_autoscaler_starts_the_pools_own_type_of_node_for_one_engine(cluster, config, pool):
    assert nodes_started_for(cluster, [demand(config, pool)]) == {pool: 1}


def test_without_its_resource_an_engine_could_start_the_wrong_type_of_node(cluster, config):
    bare = {name: amount for name, amount in demand(config, "decode").items() if name != "decode_engine"}
    assert nodes_started_for(cluster, [bare]) != {"decode": 1}


def test_all_replicas_of_both_pools_fit_on_the_nodes_allowed(cluster, config):
    demands = [demand(config, pool) for pool in POOLS for _ in range(config.pool(pool).max_replicas)]
    started = nodes_started_for(cluster, demands)
    assert started == {pool: cluster["available_node_types"][pool]["max_workers"] for pool in POOLS}


@pytest.mark.parametrize("pool", POOLS)
def test_a_node_full_of_engines_has_cpus_for_all_of_them(cluster, config, pool):
    resources = cluster["available_node_types"][pool]["resources"]
    assert resources["GPU"] * demand(config, pool)["CPU"] <= resources["CPU"]


def test_all_ingress_replicas_fit_on_the_head_and_are_pinned_to_it(cluster, config):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    options = config.deployment_options("ingress")["ray_actor_options"]
    assert options["label_selector"].items() <= head["labels"].items()
    assert math.ceil(config.ingress.max_replicas * options["num_cpus"]) <= head["resources"]["CPU"]


def test_nodes_install_the_torch_of_the_makefile(cluster):
    makefile = (ROOT / "Makefile").read_text()
    (wanted,) = {word for line in cluster["setup_commands"] for word in line.split() if word.startswith("torch==")}
    assert wanted in makefile.split()


def test_every_node_starts_ray_with_the_settings_of_serve_env(cluster: dict[str, Any]) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (command for command in cluster[key] if "ray start" in command)
        assert "PATH=~/env/bin:$PATH; set -a; . ~/kvrelay/app/serve.env; set +a; ~/env/bin/ray start" in start


def test_serve_env_is_what_a_shell_and_make_serve_read_and_ray_knows() -> None:
    command = ["bash", "-c", "PATH=$1:$PATH; set -a; . app/serve.env; set +a; env", "bash", str(PROGRAMS)]
    printed = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=True).stdout.splitlines()
    of_others = "RAY_", "MALLOC_"
    by_shell = {key: value for key, value in (line.split("=", 1) for line in printed) if key.startswith(of_others)}
    by_us = read_settings(SERVE_SETTINGS)
    assert by_shell == by_us
    assert by_us["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(PROGRAMS / "kvrelay-haproxy")
    of_python = constants, node, ray_constants
    readers = *(Path(str(module.__file__)) for module in of_python), Path(ray.__path__[0]) / GCS_SERVER
    known = b"".join(path.read_bytes() for path in readers)
    unknown = [name for name in by_us if name.encode() not in known]
    assert unknown == ["MALLOC_ARENA_MAX"], "glibc reads that one"


def test_without_the_programs_in_path_the_settings_name_no_haproxy_that_ray_could_take() -> None:
    command = ["sh", "-c", '. app/serve.env; printf %s "$RAY_SERVE_HAPROXY_BINARY_PATH"']
    printed = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=True).stdout
    assert printed == "kvrelay-haproxy, which is not in PATH"
    assert not Path(printed).exists()


def test_every_shell_of_a_node_sends_the_token_that_is_mounted(cluster, tmp_path):
    assert any(target.endswith("/.ray/auth_token") for target in cluster["file_mounts"])
    (setup,) = [command for command in cluster["setup_commands"] if "RAY_AUTH_MODE" in command]
    (tmp_path / ".bashrc").touch()
    script = f"{setup}; {setup}; source ~/.bashrc; echo $RAY_AUTH_MODE; cat ~/.bashrc"
    shell = subprocess.run(["bash", "-c", script], env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert shell.stdout.splitlines() == ["token", "export RAY_AUTH_MODE=token"], shell.stderr
