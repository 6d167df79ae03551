"""What numba keeps on disk is of these sources: whoever upgrades runs nothing of what was there before."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.dispatcher import Dispatcher

from deployments.engine import compiled
from deployments.engine.batch import build
from deployments.engine.compiled import digest_of, first_writable
from deployments.engine.kernels import cpu_layers, cpu_paged
from deployments.engine.speculation import lengths

ENGINE = Path(compiled.__file__).parent
# A package in which one file calls what is in another.
CALLER = """
from deployments.engine.compiled import njit
from deployments.engine.kernels.callee import callee

@njit(cache=True)
def caller():
    return callee()
"""
CALLEE = """
from deployments.engine.compiled import njit

@njit(cache=True)
def callee():
    return {value}
"""


@pytest.mark.parametrize("kernel", [cpu_layers.run_layers, cpu_paged.attend_runs, lengths._choose, build._lay_out])
def test_all_that_is_kept_is_kept_there(kernel: Dispatcher) -> None:
    kept = Path(kernel._cache._impl.locator.get_cache_path())  # type: ignore[attr-defined]
    assert f"kernels-{digest_of(ENGINE / 'kernels')}" in kept.parts


def test_nobody_compiles_past_it() -> None:
    for path in ENGINE.rglob("*.py"):
        assert path.name == "compiled.py" or "from numba import njit" not in path.read_text(), path


def test_another_name_or_content_is_another_digest(tmp_path: Path) -> None:
    found = {digest_of(tmp_path)}
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("c.txt", "3")):
        (tmp_path / name).write_text(content)
        found.add(digest_of(tmp_path))
    assert len(found) == 4, "what is not Python does not count"


def test_the_first_folder_that_can_be_written_to_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = tmp_path / "new" / "deep"
    assert first_writable([tmp_path / "file" / "x", made, tmp_path]) == made
    (alone,) = {first_writable([tmp_path / "file" / "x"])}
    assert alone.is_dir() and not alone.is_relative_to(tmp_path)


@pytest.mark.parametrize("place", ["beside", "told", "home"])
def test_a_kernel_follows_what_it_calls_in_another_file(tmp_path: Path, place: str) -> None:
    root, kept = tmp_path / "deployments" / "engine", tmp_path / "kept"
    (root / "kernels").mkdir(parents=True)
    for folder in (root.parent, root, root / "kernels"):
        (folder / "__init__.py").touch()
    shutil.copy(ENGINE / "compiled.py", root)
    (root / "kernels" / "caller.py").write_text(CALLER)
    # Python itself tells a file that was changed within a second by its size alone.
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(kept)}
    if place == "told":
        environment["NUMBA_CACHE_DIR"] = str(kept)
    elif place == "home":
        for folder in (root, root / "kernels"):
            (folder / "__pycache__").touch()  # in which nothing can be written, not even by root
    program = "from deployments.engine.kernels.caller import *; print(caller(), sum(caller.stats.cache_hits.values()))"
    said = []
    for value in (1, 1, 2, 1):
        (root / "kernels" / "callee.py").write_text(CALLEE.format(value=value))
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        said.append(ran.stdout.split())
    assert said == [["1", "0"], ["1", "1"], ["2", "0"], ["1", "1"]]
    where = {"beside": root / "__pycache__", "told": kept, "home": kept / ".cache" / "kvrelay"}[place]
    assert len(list(where.glob("kernels-*"))) == 2 and list(where.glob("kernels-*/**/*.nbc"))
