"""What one module alone does, read from the project's source: write a sequence, end a request, name Ray's transport."""

import ast
from collections.abc import Iterator

import pytest

from tests.sources import MODULES, imports, imports_of, is_under, source_of

SEQUENCE = "deployments.engine.scheduling.sequence"
CHANGES = (
    "append",
    "extend",
    "insert",
    "pop",
    "remove",
    "clear",
    "sort",
    "reverse",
    "fromlist",
    "frombytes",
    "byteswap",
)


def sequence_fields() -> set[str]:
    (sequence,) = [
        node
        for node in ast.parse(source_of(SEQUENCE)).body
        if isinstance(node, ast.ClassDef) and node.name == "Sequence"
    ]
    return {n.target.id for n in sequence.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def writes_of(source: str, fields: set[str]) -> list[str]:
    """Where a source writes fields of others: sets or deletes them or items of them, or calls what changes them.

    A list that was first given another name is not followed.
    """
    written = []
    for node in ast.walk(ast.parse(source)):
        changed: ast.AST | None = None
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed = node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changed = node.func.value
        while isinstance(changed, ast.Subscript):
            changed = changed.value
        is_field = isinstance(changed, ast.Attribute) and changed.attr in fields
        if is_field and isinstance(changed, ast.Attribute) and ast.unparse(changed.value) not in ("self", "cls"):
            written.append(ast.unparse(node))
    return written


def test_only_a_sequence_writes_its_fields():
    fields = sequence_fields()
    assert "num_computed_tokens" in fields
    users = [m for m in MODULES if m != SEQUENCE and SEQUENCE in imports(m)]
    rooms = {m for m in MODULES if is_under(m, "deployments.engine")} - {SEQUENCE}
    assert {m: found for m in {*rooms, *users} if (found := writes_of(source_of(m), fields))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "sequence.token_ids.append(1)",
        "run.sequence.block_table[0] = 1",
        "sequence.block_table[1:] += other",
        "del sequence.block_hashes[3:]",
        "sequence.num_tokens += 1",
        "for sequence.is_held in (): pass",
    ],
)
def test_a_write_to_a_sequence_is_found(source):
    assert writes_of(source, sequence_fields()) != []


def constructions_of(source: str, name: str) -> int:
    """How often a source makes an instance of a class, by whatever name it was imported."""
    tree = ast.parse(source)
    imported = [a for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names]
    names = {name, *(alias.asname for alias in imported if alias.name == name and alias.asname)}
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sum(
        (isinstance(called, ast.Name) and called.id in names)
        or (isinstance(called, ast.Attribute) and called.attr == name)
        for called in calls
    )


def test_one_place_says_that_a_request_has_ended():
    sayers = {module: count for module in MODULES if (count := constructions_of(source_of(module), "Ended"))}
    assert sayers == {"deployments.engine_host": 1}


@pytest.mark.parametrize(
    "source", ["Ended('r')", "messages.Ended('r')", "from deployments.messages import Ended as Over\nOver('r')"]
)
def test_a_construction_is_found(source):
    assert constructions_of(source, "Ended") == 1


RDT_OWNER = "deployments.kv_transfer.direct"
RDT_NAMES = ("ray.experimental", "tensor_transport", "rdt")


def test_one_module_names_ray_direct_transport():
    names = {
        module
        for module, path in MODULES.items()
        if any(name in word for word in _words(path.read_text()) for name in RDT_NAMES)
    }
    assert names == {RDT_OWNER}


def _words(source: str) -> Iterator[str]:
    """Identifiers, imports and keyword arguments of a source: code, not what docstrings say."""
    tree = ast.parse(source)
    yield from imports_of("", source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield f"{ast.unparse(node.value)}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def test_one_module_holds_an_untyped_handle_of_an_actor():
    assert {m for m in MODULES if "ray.actor.ActorHandle" in imports(m)} == {"deployments.engine_handle"}
