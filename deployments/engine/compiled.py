"""numba, for all that compile: what it keeps on disk is of these sources.

numba looks for changes in the file of a function alone, and keeps with it what it calls in other files. So after an
upgrade it would go on with a part of what was there before. What it keeps lies in a folder by the sources of all
kernels instead: in `NUMBA_CACHE_DIR`, beside them, or in the user's cache; where none can be written to, for as long as
the process lives.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from numba import njit, prange
from numba.core import config

__all__ = ["njit", "prange"]

_HERE = Path(__file__).parent


def digest_of(folder: Path) -> str:
    """Of the names and contents of its Python files."""
    digest = blake2b(digest_size=8)
    for path in sorted(folder.glob("*.py")):
        digest.update(b"%s\0%s\0" % (path.name.encode(), path.read_bytes()))
    return digest.hexdigest()


def first_writable(folders: Iterable[Path]) -> Path:
    """The first that is there, or can be made, and can be written to; else a new one for this process."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    folder = Path(tempfile.mkdtemp(prefix="kvrelay-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _folders() -> Iterable[Path]:
    """Where it may be kept, the best first."""
    name = f"kernels-{digest_of(_HERE / 'kernels')}"
    folders = [_HERE / "__pycache__"]
    if own := config.CACHE_DIR:  # type: ignore[attr-defined]
        folders.insert(0, Path(own))
    if home := os.environ.get("XDG_CACHE_HOME"):
        folders.append(Path(home) / "kvrelay")
    elif home := os.environ.get("HOME"):
        folders.append(Path(home) / ".cache" / "kvrelay")
    return (folder / name for folder in folders)


config.CACHE_DIR = str(first_writable(_folders()))  # type: ignore[attr-defined]
