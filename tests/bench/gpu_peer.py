"""What `gpu_vllm` measured on this card, for the columns of `bench_gpu`."""

import json
import statistics
from pathlib import Path
from typing import Any


class Peer:
    """vLLM's figures; none without a file.

    Args:
        path: what `tests.bench.gpu_vllm` wrote; None: nothing was measured beside.
        device: the card that this runs on.

    Raises:
        ValueError: the file is no such file, or of another card.
    """

    def __init__(self, path: Path | None, device: str) -> None:
        self.name, self._models = "", {}
        if path is None:
            return
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            self.name, self._models, of = f"vLLM {content['vllm']}", content["models"], content["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--beside {path} is not what tests.bench.gpu_vllm writes: {error!r}") from None
        if of != device:
            raise ValueError(f"--beside {path} is of an {of}, this is an {device}: ratios would compare cards")

    def milliseconds(self, model: str, kind: str, row: str) -> float | None:
        """The median of a row; None: it was not measured.

        Args:
            model: of `SHAPES`.
            kind: tpot or prefill.
            row: of that kind, as in the file.
        """
        times = self._models.get(model, {}).get(kind, {}).get(row)
        return statistics.median(times) * 1e3 if times else None

    def throughput(self, model: str) -> float | None:
        """Output tokens per second, likewise."""
        rates = self._models.get(model, {}).get("throughput")
        return statistics.median(rates) if rates else None
