"""The walk through the code in docs/request-path.md: every file and every name in it exists, and it stays short."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WALK = (ROOT / "docs" / "request-path.md").read_text()
MAX_FILES = 30

ITEM = re.compile(r"^(\d+)\. \[`([^`]+)`\](.*?)(?=^\d+\. |^$)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| [\d, ]+ \| (.*?) \|", re.MULTILINE)
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)`")


def items() -> list[tuple[int, str, str]]:
    return [(int(number), path, text) for number, path, text in ITEM.findall(WALK)]


def leaves() -> list[str]:
    """Files that a request enters and a reader need not open."""
    return [f"deployments/{path}" for cell in ROW.findall(WALK) for path in re.findall(r"`([\w/]+\.py)`", cell)]


def definitions(source: str) -> Iterator[str]:
    """Names that a module defines, those in classes as `Class.name` as well as alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{name}" for child in node.body for name in _bound(child))
        else:
            yield from _bound(node)


def _bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@cache
def names_in(path: str) -> frozenset[str]:
    return frozenset(definitions((ROOT / path).read_text()))


@cache
def names_on_the_walk() -> frozenset[str]:
    # What the parts say to each other may be named anywhere.
    return frozenset().union(names_in("deployments/messages.py"), *(names_in(path) for _, path, _ in items()))


def test_the_files_are_numbered_in_order_and_no_more_than_thirty():
    numbers = [number for number, _, _ in items()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) <= MAX_FILES
    assert len({path for _, path, _ in items()}) == len(numbers)
    assert f"There are {len(numbers)} files." in WALK
    skipped = [number for number, path, _ in items() if is_of_prefill_pool(path)]
    told = f"{', '.join(map(str, skipped[:-1]))} and {skipped[-1]}: {len(numbers) - len(skipped)} files."
    assert f"skip {told}" in WALK


def is_of_prefill_pool(path: str) -> bool:
    """Whether only a request that another pool computes enters a file."""
    return path.startswith(("deployments/prefill", "deployments/engine/handoff/", "deployments/kv_transfer/"))


def test_the_other_files_that_a_request_enters_are_counted_and_each_is_told_once():
    entered = [*(path for _, path, _ in items()), *leaves()]
    assert len(set(entered)) == len(entered)
    assert f"enters {len(entered)} files" in WALK and f"The other {len(leaves())} return" in WALK


@pytest.mark.parametrize(("path", "text"), [item[1:] for item in items()], ids=[item[1] for item in items()])
def test_a_file_of_the_walk_defines_what_is_to_be_looked_at_in_it(path, text):
    told = NAME.findall(text)
    assert any(name in names_in(path) for name in told)
    elsewhere = [name for name in told if name not in names_in(path)]
    # What another file of the walk defines is named with its class, or is a message.
    assert [name for name in elsewhere if name not in names_on_the_walk() | _named_files(text)] == []


def _named_files(text: str) -> set[str]:
    """Names that the files which a text names in passing define: `CudaRunner` in `execution/cuda.py`."""
    found = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    paths = [ROOT / "deployments" / "engine" / path for path in found]
    return {name for path in paths for name in definitions(path.read_text())}
