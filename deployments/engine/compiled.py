"""numba, for all that compile: what it keeps on disk is of these sources.

numba looks for changes in the file of a function alone, and keeps with it what it calls in other files. So after an
upgrade it would go on with a part of what was there before. What it keeps lies in a folder by the sources of all
kernels instead: beside them, or in `NUMBA_CACHE_DIR`; where neither can be written to, in numba's own place.
"""

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


_kept = Path(config.CACHE_DIR or _HERE / "__pycache__")  # type: ignore[attr-defined]
config.CACHE_DIR = str(_kept / f"kernels-{digest_of(_HERE / 'kernels')}")  # type: ignore[attr-defined]
