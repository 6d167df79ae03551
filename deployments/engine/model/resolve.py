"""From what the user calls a model to a folder that transformers can load. Loads neither torch nor transformers.

But for the one time that a GGUF file has to be converted, which `gguf.py` does. Called by whoever needs the model, in
any process; later calls find the folder.
"""

import logging
from fcntl import LOCK_EX, flock
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from deployments.engine.model.files import (
    BUNDLED_MODEL,
    BUNDLED_PACKAGE,
    bundled_file,
    cache_folder,
    check_files,
    gguf_shards,
    local_path,
    scratch_beside,
)

logger = logging.getLogger(__name__)

# Part of a converted folder's name: folders of another version are not found again.
_VERSION = 2


def resolve_model(model: str) -> str:
    """Turn what the user calls the model into something transformers can load.

    Args:
        model: hub id, local folder, GGUF file, or the bundled model's name.

    Returns:
        A hub id or folder. A GGUF file is converted at the first call and found again at later ones, by any process.

    Raises:
        UnsupportedModelError: the bundled model's package is missing, or the file or folder is not whole.
    """
    if model == BUNDLED_MODEL:
        # Its times are those of its installation: each environment would convert it anew, and keep 540 MB more.
        return str(_converted(bundled_file(), version(BUNDLED_PACKAGE)))
    path = local_path(model)
    if path is None:
        return model
    check_files(model)
    return str(path if path.is_dir() else _converted(path.resolve()))


def _converted(file: Path, release: str | None = None) -> Path:
    """The folder of a GGUF file, written once; concurrent callers wait for the first.

    Args:
        file: one of a split file's shards stands for all.
        release: says what is in the file; None: its size and time do.

    Raises:
        UnsupportedModelError: transformers does not know the architecture, or the file is not whole.
    """
    shards = gguf_shards(file)
    stats = [shard.stat() for shard in shards]
    content = release or "-".join(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)
    identity = f"{_VERSION}-{file.name}-{content}"
    target = cache_folder() / f"{file.stem}-{blake2b(identity.encode(), digest_size=6).hexdigest()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        flock(lock, LOCK_EX)
        if not target.is_dir():
            from deployments.engine.model import gguf

            logger.info("converting %s to %s (once)", file, target)
            with scratch_beside(target) as scratch:
                gguf.write_dense(shards, scratch)
                scratch.rename(target)  # whole or not at all
    return target
