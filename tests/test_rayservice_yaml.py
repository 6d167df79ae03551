"""The manifest for KubeRay: Serve and the application accept what is in it, and its groups have what engines ask for.

Its form is not held against KubeRay's own schema, which no package ships: docs/kubernetes.md says how to do that. But
Ray's autoscaler in the head's pod reads a cluster's groups by code that is in Ray, and that is asked here.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from app.config import AppConfig
from app.local import SERVE_SETTINGS, read_settings
from tests.cluster_nodes import POOLS, demand, nodes_started_for

ROOT = Path(__file__).parents[1]
HAPROXY = "RAY_SERVE_HAPROXY_BINARY_PATH"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "rayservice.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """Of the Ray cluster."""
    cluster: dict[str, Any] = manifest["spec"]["rayClusterConfig"]
    return cluster


@pytest.fixture(scope="module")
def deploy(manifest: dict[str, Any]) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))


@pytest.fixture(scope="module")
def config(deploy: ServeDeploySchema) -> AppConfig:
    (application,) = deploy.applications
    assert application.import_path == "app:graph"
    return AppConfig.model_validate(application.args)


@pytest.fixture(scope="module")
def cluster(manifest: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """What the autoscaler in the head's pod makes of it."""
    made: dict[str, Any] = _derive_autoscaling_config_from_ray_cr({"metadata": manifest["metadata"], "spec": spec})
    return made


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"]["containers"][0] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_its_application_is_disaggregated_and_planned(config, deploy):
    assert config.mode == "disaggregated" and config.planner.enabled and not config.planner.dry_run
    assert deploy.http_options.port == 8000


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_pinned_to_the_group_of_its_name_and_to_no_other(cluster, config, pool):
    selector = {"pool": pool}
    assert config.deployment_options(pool)["placement_group_bundle_label_selector"] == [selector, selector]
    assert [name for name, kind in cluster["available_node_types"].items() if kind["labels"] == selector] == [pool]


@pytest.mark.parametrize("pool", POOLS)
def test_the_autoscaler_starts_a_pod_of_the_pools_own_group_for_one_engine(cluster, config, pool):
    assert nodes_started_for(cluster, [demand(config, pool)]) == {pool: 1}


def test_all_replicas_of_both_pools_get_pods_and_no_group_has_more(cluster, config, spec):
    demands = [demand(config, pool) for pool in POOLS for _ in range(config.pool(pool).max_replicas)]
    most = {name: group["maxReplicas"] for name, group in groups(spec).items()}
    assert nodes_started_for(cluster, demands) == most


@pytest.mark.parametrize("pool", POOLS)
def test_no_group_keeps_more_pods_than_its_pool_keeps_replicas(config, spec, pool):
    assert groups(spec)[pool]["minReplicas"] <= config.pool(pool).min_replicas


def test_all_ingress_replicas_fit_on_the_head_and_are_pinned_to_it(cluster, config):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    options = config.deployment_options("ingress")["ray_actor_options"]
    assert options["label_selector"] == head["labels"]
    assert config.ingress.max_replicas * options["num_cpus"] <= head["resources"]["CPU"]


def test_what_a_group_tells_ray_of_its_pods_is_what_kubernetes_gives_them(spec):
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        given = group["template"]["spec"]["containers"][0]["resources"]
        assert given["requests"] == given["limits"]
        assert int(group["resources"]["CPU"]) == int(given["limits"]["cpu"])
        assert int(group["resources"]["GPU"]) == int(given["limits"].get("nvidia.com/gpu", 0))


def test_engines_run_only_on_nodes_with_gpus_and_are_let_onto_them(spec):
    for name, group in groups(spec).items():
        pod = group["template"]["spec"]
        assert pod["nodeSelector"]["nvidia.com/gpu.product"], name
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


def test_a_worker_without_a_proxy_counts_as_ready_once_its_raylet_is(deploy, spec):
    assert deploy.proxy_location == "HeadOnly"
    for group in spec["workerGroupSpecs"]:
        (worker,) = group["template"]["spec"]["containers"]
        assert worker["readinessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_every_pod_starts_ray_with_the_settings_of_serve_env_and_one_image(spec):
    wanted = read_settings(SERVE_SETTINGS) | {HAPROXY: "/usr/local/bin/kvrelay-haproxy"}
    for container in containers(spec):
        assert {variable["name"]: variable["value"] for variable in container["env"]} == wanted
    assert len({container["image"] for container in containers(spec)}) == 1


def test_ray_asks_strangers_for_a_token_and_is_of_the_version_that_is_installed(spec):
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["rayVersion"].split(".")[:2] == version("ray").split(".")[:2]


def test_the_image_of_the_guide_has_the_torch_of_the_makefile():
    guide, makefile = (ROOT / "docs/kubernetes.md").read_text(), (ROOT / "Makefile").read_text()
    (wanted,) = {word for word in guide.split() if word.startswith("torch==")}
    assert wanted in makefile.split()
