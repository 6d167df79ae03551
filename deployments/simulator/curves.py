"""What an engine takes for a step, and a hand-off: measured, or given."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

# Bounds of figures: a step that takes no time never ends a second, and a pool holds a block.
_LEAST_STEP_S, _MOST_S = 1e-6, 3600.0
_WHOLE = {
    "max_num_batched_tokens": (1, 10**7),
    "max_num_seqs": (1, 10**6),
    "num_kv_tokens": (512, 10**12),
}


class FigureError(ValueError):
    """A figure of an engine is not one; the message names it, and those that there are."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Of one kind of engine.

    Attributes:
        step_s: each step.
        token_s: each prompt token in it.
        sequence_s: each sequence that draws a token in it.
        context_s: each token of their KV.
        handoff_s: until the last chunk of a hand-off has arrived, whatever its size.
        handoff_token_s: and for each token of that chunk.
        tier_token_s: until a token's KV has come from the shared tier.
        max_num_batched_tokens: of a step.
        max_num_seqs: at once.
        num_kv_tokens: of the KV pool.
    """

    step_s: float
    token_s: float
    sequence_s: float
    context_s: float
    handoff_s: float = 0.010
    handoff_token_s: float = 7e-7
    tier_token_s: float = 7.6e-6
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    num_kv_tokens: int = 450_000

    def slower(self, factor: float) -> "Curves":
        """An engine that takes so many times as long for each step."""
        return replace(
            self,
            step_s=self.step_s * factor,
            token_s=self.token_s * factor,
            sequence_s=self.sequence_s * factor,
            context_s=self.context_s * factor,
        )


# Llama-3.1-8B on an H100 (docs/measured.md, 2026-11-27 and 28): steps of 1, 32 and 128 sequences of about 256 tokens
# take 5.41, 6.44 and 8.46 ms, prompts of 512 and 8,192 tokens 17.5 and 203.8 ms; what is behind the first token of a
# hand-off takes 10 ms, bytes 80 GiB/s at 128 KiB of KV per token. Not measured: that KV is read at 2.5 TB/s, 52 ns per
# token.
LLAMA_8B_H100 = Curves(step_s=0.0055, token_s=2.42e-5, sequence_s=1.0e-5, context_s=5.2e-8, handoff_token_s=1.5e-6)


def read_figures(path: Path) -> dict[str, Any]:
    """An object from a file of JSON.

    Raises:
        FigureError: it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FigureError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise FigureError(f"{path}: an object of names and figures is needed, not {found!r:.80}")
    return found


def with_figures(curves: Curves, figures: Mapping[str, object], where: str) -> Curves:
    """Curves of which some figures are others.

    Args:
        curves: the rest.
        figures: by the names of `Curves`.
        where: they come from, for errors.

    Raises:
        FigureError: there is no such figure, or its value is not within its bounds.
    """
    names = [field.name for field in fields(Curves)]
    for name, value in figures.items():
        if name not in names:
            raise FigureError(f"{where}: no figure {name!r}; there are {', '.join(names)}")
        if name in _WHOLE:
            check_whole(f"{where}: {name}", value, *_WHOLE[name])
        else:
            check_figure(f"{where}: {name}", value, _LEAST_STEP_S if name == "step_s" else 0.0, _MOST_S)
    return replace(curves, **figures)  # type: ignore[arg-type]


def check_figure(what: str, value: object, least: float, most: float) -> None:
    """Refuse what is no number within bounds.

    Raises:
        FigureError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise FigureError(f"{what}: {value!r:.80} is not a number of {least:,g} to {most:,g}")


def check_whole(what: str, value: object, least: int, most: int) -> None:
    """Refuse what is no whole number within bounds.

    Raises:
        FigureError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FigureError(f"{what}: {value!r:.80} is not a whole number of {least:,} to {most:,}")
