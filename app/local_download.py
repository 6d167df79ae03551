"""How far engines are with fetching a model from the hub, as its cache on this machine shows: it may take an hour.

They draw bars for a terminal, and have none. `app/local.py` asks while it waits for them.
"""

import time
from collections.abc import Iterable
from pathlib import Path

from deployments.engine.model.files import BUNDLED_MODEL, is_cached, local_path

PERIOD_S = 10.0
_UNIT = 10**9


class Downloads:
    """See the module.

    Args:
        models: as the user names them; of those that are here nothing is told.
        now_s: on the monotonic clock, as below.
    """

    def __init__(self, models: Iterable[str], now_s: float) -> None:
        absent = [m for m in models if m != BUNDLED_MODEL and local_path(m) is None and not is_cached(m)]
        self._folders = {model: _folder(model) for model in absent}
        self._sizes = {model: _size(folder) for model, folder in self._folders.items()}
        self._told_s = now_s

    def news(self, now_s: float) -> list[str]:
        """A line for each model of which more has come since the last look, which was a while ago."""
        seconds = now_s - self._told_s
        if seconds < PERIOD_S:
            return []
        lines, self._told_s = [], now_s
        for model, folder in self._folders.items():
            before, size = self._sizes[model], _size(folder)
            if size > before:
                speed = (size - before) / seconds / 1e6
                lines.append(f"downloading {model}: {size / _UNIT:.2f} GB so far, {speed:.0f} MB/s")
            self._sizes[model] = size
        return lines

    def tell(self, began_s: float) -> None:
        """Print the news, with how long all of it has taken."""
        now_s = time.monotonic()
        for line in self.news(now_s):
            print(f"{now_s - began_s:6.1f} s  {line}", flush=True)


def _folder(model: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}", "blobs")


def _size(folder: Path) -> int:
    """Bytes on the disk, of whole files and parts."""
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_blocks * 512
        except FileNotFoundError:  # a part that has just become a whole
            continue
    return total
