"""A checkpoint as its files tell it, without its weights: what it says it is, and whether it holds that.

Called when a model is loaded, and by `check.py` before a server starts.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PretrainedConfig

from deployments.engine.attention.base import IMPLEMENTATION, register
from deployments.engine.model.config import read_config
from deployments.engine.model.end_tokens import read_end_token_ids
from deployments.engine.model.headers import Headers, read_headers
from deployments.engine.model.probe import judge_layers
from deployments.engine.model.rope import separate_lengths
from deployments.engine.model.served import check_config, check_counts
from deployments.engine.model.weights import check_weights
from deployments.errors import UnsupportedModelError

# Whose classes of configurations say what they do not take: the second checks types for the first.
_JUDGES = frozenset({"transformers", "huggingface_hub"})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a model's files say of it.

    Attributes:
        headers: of its weights.
        end_token_ids: that end a text, as far as the configuration says.
    """

    config: PretrainedConfig
    headers: Headers
    end_token_ids: tuple[int, ...]


def read_checkpoint(path: str) -> Checkpoint:
    """Read and check everything but the weights.

    Args:
        path: folder or hub id.

    Raises:
        UnsupportedModelError: it is not whole, or the engine cannot run it; names what is at fault.
    """
    with _refusing_what_transformers_does_not_take(path):
        config = read_config(path)
        check_config(config)
        headers = read_headers(path)
        check_counts(path, config, headers)
        return Checkpoint(config, headers, read_end_token_ids(path, config.vocab_size))


@contextmanager
def _refusing_what_transformers_does_not_take(path: str) -> Iterator[None]:
    """Turn what transformers' own code raises about a configuration into a refusal; faults of ours stay what they are.

    Every engine would end with it, after Ray was started. A hub that cannot be reached is no fault of the model's.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if _raised_by(error) not in _JUDGES:
            raise
        raise UnsupportedModelError(
            f"model {path!r}: config.json: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _raised_by(error: Exception) -> str:
    """The package whose code raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).partition(".")[0]


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Have every refusal say which model it is of."""
    try:
        yield
    except UnsupportedModelError as error:
        if f"{path!r}: " in str(error):
            raise
        # Not from the error itself: whoever looks for the reason in a log takes the first one, which names no model.
        raise UnsupportedModelError(f"model {path!r}: {error}") from error.__cause__


def check_checkpoint(path: str, *, to_fp8: bool = False) -> None:
    """Refuse what an engine would not load, without loading it.

    Args:
        path: folder or hub id.
        to_fp8: the engine rounds weights to FP8.

    Raises:
        UnsupportedModelError: names what is at fault.
    """
    register()
    with naming(path):
        checkpoint = read_checkpoint(path)
        config, headers = checkpoint.config, checkpoint.headers
        _, model = check_weights(path, config, headers, to_fp8=to_fp8, attn_implementation=IMPLEMENTATION)
        if model is not None:
            separate_lengths(model)
            judge_layers(model)
