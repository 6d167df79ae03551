"""The import rules of the project, read from its source: who may know of whom."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import MODULES, ROOT, imports, imports_of, is_under

# For modules under each prefix: what they may not import. A rule names a module and all below it.
FORBIDDEN = {
    "deployments": ["app"],
    "deployments.messages": ["ray", "torch", "transformers", "starlette", "deployments.engine", "deployments.api"],
    "deployments.kv_groups": ["ray", "torch", "numpy", "transformers"],
    "deployments.grammars": ["ray", "torch", "numpy", "transformers", "tokenizers"],
    "deployments.errors": ["ray", "torch", "transformers", "starlette", "deployments.engine", "deployments.api"],
    "deployments.engine": ["ray", "starlette", "uvicorn", "fastapi", "httpx", "tokenizers"],
    "deployments.api": ["ray", "torch", "deployments.engine", "deployments.kv_transfer", "deployments.tokens"],
    "deployments.tokens": ["ray", "torch", "transformers", "starlette", "deployments.engine", "deployments.api"],
    "deployments.routing": [
        "ray",
        "torch",
        "numpy",
        "transformers",
        "starlette",
        "deployments.api",
        "deployments.tokens",
    ],
    **{f"deployments.kv_tier.{pure}": ["ray", "torch", "numpy"] for pure in ("index", "keys", "policy", "settings")},
    "deployments.kv_tier": ["torch", "transformers", "starlette", "deployments.api", "deployments.engine"],
    "deployments.simulator": ["ray", "torch", "numpy", "starlette", "deployments.api", "deployments.tokens"],
    "deployments.planner": ["ray", "torch", "numpy", "starlette", "deployments.api", "deployments.routing"],
    "deployments.engine.scheduling": ["torch", "numpy", "transformers"],
    "deployments.engine_info": ["ray", "torch", "numpy", "transformers"],
    "deployments.load": ["ray", "torch", "numpy", "transformers", "starlette", "deployments.api"],
    # That it loads no torch is held where it runs: tests/deployments/test_light_ingress.py.
    "deployments.ingress": ["deployments.engine_host", "deployments.engine.engine", "deployments.kv_transfer.direct"],
    "deployments.engine_tier": ["ray", "starlette", "deployments.api"],
    "deployments.filling": ["ray", "starlette", "deployments.api"],
    "deployments.engine_host": ["ray", "starlette", "deployments.api"],
    "deployments.local_engine": ["ray", "starlette", "deployments.api"],
    **{f"deployments.api.{room}": ["starlette", "deployments.api.http"] for room in ("reasoning", "tools")},
    "deployments.api.responses": ["starlette.requests", "starlette.responses", "deployments.api.http"],
    "load_tests": ["app", "deployments", "ray", "torch"],
}
# Rooms and files of the engine; each may import those before it alone.
ENGINE_ROOMS = (
    "config",
    "stats",
    "upload",
    "compiled",
    "kernels",
    "kv",
    "scheduling",
    "batch",
    "attention",
    "layers",
    "model",
    "grammar",
    "sampling",
    "execution",
    "handoff",
    "lending",
    "speculation",
    "process",
    "outputs",
    "pacing",
    "endings",
    "engine",
    "loop",
)
# Rooms and files around the engine; each may import those before it alone.
PLACES = (
    "errors",
    "receipts",
    "messages",
    "kv_groups",
    "grammars",
    "engine",
    "engine_info",
    "replica_stats",
    "apart",
    "ray_errors",
    "serve_state",
    "roles",
    "kv_transfer",
    "kv_tier",
    "tokens",
    "load",
    "planner",
    "routing",
    "simulator",
    "planner_log",
    "pool_policy",
    "request_router",
    "api",
    "telemetry",
    "engine_handle",
    "engine_builder",
    "engine_tier",
    "filling",
    "engine_host",
    "engine_actor",
    "local_engine",
    "engine_client",
    "front",
    "parity",
    "prefill",
    "decode",
    "receipt_log",
    "decode_client",
    "pool_backend",
    "service_look",
    "ingress",
)
# What of the engine loads no torch, and so may be known outside; the rest is for those in whose process it lives.
LIGHT_ENGINE = [
    "deployments.engine.config",
    "deployments.engine.handoff.outbox",
    "deployments.engine.handoff.outgoing",
    "deployments.engine.handoff.states",
    "deployments.engine.stats",
    "deployments.engine.model.files",
    "deployments.engine.model.resolve",
    "deployments.engine.model.tokenizer_files",
    "deployments.engine.scheduling.block_hash",
    "deployments.engine.scheduling.cache_log",
    "deployments.engine.scheduling.positions",
    "deployments.engine.scheduling.retention",
]
ENGINE_HOSTS = ("engine", "engine_builder", "engine_tier", "filling", "engine_host", "local_engine")
# Of the project's own modules, these alone may be imported from under each prefix.
OWN_ALLOWED = {
    "deployments.engine": [
        "deployments.engine",
        "deployments.messages",
        "deployments.kv_groups",
        "deployments.grammars",
        "deployments.receipts",
        "deployments.errors",
    ],
    "deployments.grammars": ["deployments.messages", "deployments.errors"],
    "deployments.messages": ["deployments.receipts", "deployments.errors"],
    "deployments.kv_groups": ["deployments.errors"],
    "deployments.receipts": [],
    "deployments.errors": [],
}


def _room(module: str) -> int:
    """Place of a module of the engine among its rooms; -1: it is in none."""
    room = (
        module.removeprefix("deployments.engine.").partition(".")[0] if is_under(module, "deployments.engine") else ""
    )
    return ENGINE_ROOMS.index(room) if room in ENGINE_ROOMS else -1


def _place(module: str) -> int:
    """Place of a module among those of the deployments; -1: it is not of them."""
    place = module.removeprefix("deployments.").partition(".")[0] if module.startswith("deployments.") else ""
    return PLACES.index(place) if place in PLACES else -1


def _works_with_engine(name: str) -> bool:
    """Whether whoever imports this loads what runs a model."""
    is_package = MODULES.get(name, Path()).name == "__init__.py"
    return (
        name in MODULES
        and not is_package
        and is_under(name, "deployments.engine")
        and not any(is_under(name, light) for light in LIGHT_ENGINE)
    )


def violations(module: str, source: str) -> list[str]:
    """What a module imports and may not."""
    imported = set(imports_of(module, source))
    found = [
        name
        for prefix, forbidden in FORBIDDEN.items()
        if is_under(module, prefix)
        for name in imported
        if any(is_under(name, bad) for bad in forbidden)
    ]
    for prefix, allowed in OWN_ALLOWED.items():
        if is_under(module, prefix):
            own = {name for name in imported if is_under(name, "deployments") and name != "deployments"}
            found += [name for name in own if not any(is_under(name, good) for good in allowed)]
    found += [name for name in imported if _room(name) > _room(module) >= 0]
    found += [name for name in imported if _place(name) > _place(module) >= 0]
    if not any(is_under(module, f"deployments.{host}") for host in ENGINE_HOSTS):
        found += filter(_works_with_engine, imported)
    if is_under(module, "deployments.engine") and "transformers.AutoTokenizer" in imported:
        found += ["transformers.AutoTokenizer"] if module != "deployments.engine.model.gguf" else []
    return sorted(found)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_place_allows(module):
    assert violations(module, MODULES[module].read_text()) == []


def reached_from(module: str, source: str | None = None) -> set[str]:
    """All that comes along when a module is imported and its functions run: the project's modules and what they import.

    Args:
        module: where it begins.
        source: of that module; None: as it is.
    """
    reached, todo = {module}, [module]
    while todo:
        name = todo.pop()
        imported = imports(name) if source is None or name != module else set(imports_of(name, source))
        found = {*imported, name.rpartition(".")[0]} - reached
        reached |= found
        todo += found & MODULES.keys()
    return reached


def forbidden_within_reach(module: str, source: str | None = None) -> list[str]:
    """What a module may not import and comes to by way of others, in functions too."""
    forbidden = {bad for prefix, names in FORBIDDEN.items() if is_under(module, prefix) for bad in names}
    reached = reached_from(module, source) if forbidden else set()
    return sorted(name for name in reached if any(is_under(name, bad) for bad in forbidden))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_reaches_nothing_that_it_may_not_import(module):
    assert forbidden_within_reach(module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("deployments.engine.scheduling.scheduler", "from deployments.engine.upload import upload"),
        ("deployments.engine.scheduling.scheduler", "def f():\n    from deployments.engine.kv.cache import KVCache"),
        ("deployments.planner.plan", "from deployments.engine.engine import Engine"),
    ],
)
def test_what_is_imported_by_way_of_others_is_found(module, source):
    assert forbidden_within_reach(module, source) != []


@pytest.mark.parametrize("room", ["attention", "kernels", "kv", "layers", "model"])
def test_what_computes_knows_nothing_of_sequences_not_even_through_others(room):
    rooms = [module for module in MODULES if is_under(module, f"deployments.engine.{room}")]
    # What positions mean is the model's matter: the scheduler's file of it knows no sequence.
    known = {"deployments.engine.scheduling", "deployments.engine.scheduling.positions"} if room == "model" else set()
    reached = {name for module in rooms for name in reached_from(module) & MODULES.keys()}
    assert {name for name in reached if is_under(name, "deployments.engine.scheduling")} <= known


def imported_of_project(module: str) -> set[str]:
    """The project's modules that a module imports anywhere: in functions too, and for the type checker alone."""
    return ({*imports(module)} & MODULES.keys()) - {module}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last one the first; empty: there are none."""
    left = {module: set(imported) for module, imported in graph.items()}
    while leaves := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in leaves}
    path: list[str] = []
    module = min(left, default="")
    while module and module not in path:
        path.append(module)
        module = min(left[module] & left.keys())
    return path[path.index(module) :] if module else []


def test_no_module_imports_itself_by_way_of_others():
    assert find_cycle({module: imported_of_project(module) for module in MODULES}) == []


def test_an_import_within_a_function_or_for_the_type_checker_counts():
    late = {"deployments.engine.model.gguf", "deployments.engine_host"}
    assert late <= imported_of_project("deployments.engine.model.resolve") | imported_of_project(
        "deployments.engine_actor"
    )


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_every_room_and_file_of_the_deployments_has_its_place():
    assert {module.split(".")[1] for module in MODULES if module.startswith("deployments.")} == set(PLACES)


def test_no_test_borrows_from_another_test_file():
    borrowed = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports_of("", path.read_text())
        if is_under(name, "tests") and any(part.startswith("test_") for part in name.split("."))
    }
    assert borrowed == set()


def test_every_room_of_the_engine_has_its_place():
    rooms = {
        module.split(".")[2] for module in MODULES if module.count(".") >= 2 and is_under(module, "deployments.engine")
    }
    assert rooms == set(ENGINE_ROOMS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("deployments.engine.scheduling.scheduler", "import ray"),
        ("deployments.engine.scheduling.scheduler", "from ...decode import Decode"),
        ("deployments.engine.scheduling.scheduler", "import torch"),
        ("deployments.engine.attention.sdpa", "from deployments import telemetry"),
        ("deployments.engine.kernels.cpu", "from deployments.engine.attention.base import IMPLEMENTATION"),
        ("deployments.engine.batch.build", "from transformers import AutoTokenizer"),
        ("deployments.load.outlook", "from deployments.telemetry.pool_metrics import render"),
        ("deployments.load.outlook", "from deployments.engine.engine import Engine"),
        ("deployments.messages", "from deployments.engine_info import EngineInfo"),
        ("deployments.kv_groups", "import torch"),
        ("deployments.ingress", "def f():\n    from deployments.engine.model.load import load_model"),
        ("deployments.ingress", "from deployments.engine_host import EngineHost"),
        ("deployments.ingress", "from deployments.kv_transfer.direct import Sender"),
        ("deployments.load.outlook", "import torch"),
        ("deployments.engine_info", "import torch"),
        ("deployments.engine_tier.tier", "import ray"),
        ("deployments.engine_host", "import ray"),
        ("deployments.local_engine", "import ray"),
        ("deployments.api.tools.rules", "from deployments.api.http import build_app"),
        ("deployments.api.responses.forms", "from starlette.responses import Response"),
        ("deployments.prefill", "from deployments.decode import Decode"),
        ("app.config", "from deployments.engine.model.load import load_model"),
        ("deployments.api.text", "def f():\n    import torch.nn"),
        ("deployments.decode", "from app.config import AppConfig"),
        ("load_tests.run", "from deployments import messages"),
    ],
)
def test_the_rules_catch_a_wrong_import(module, source):
    assert violations(module, source) != []


@pytest.mark.parametrize("first", ["from app.graph import graph", "from app import graph"])
def test_the_package_exports_the_function_whatever_was_imported_first(first):
    check = "from app import graph; import app; assert callable(graph) and app.graph is graph"
    subprocess.run([sys.executable, "-c", f"{first}; {check}"], cwd=ROOT, check=True, timeout=120)
