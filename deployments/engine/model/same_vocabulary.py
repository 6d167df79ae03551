"""Whether two models have the same tokens under the same ids, so that one can guess what the other will draw.

Reads the files of their tokenizers, no weights. Called while models are loaded, and before a server starts.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers.utils.hub import cached_file

from deployments.engine.model.files import read_json
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


def check_same_vocabulary(path: str, vocab_size: int, drafter_path: str, drafter_vocab_size: int) -> None:
    """Refuse a pair whose tokens differ.

    Args:
        path: folder or hub id of the model.
        vocab_size: rows of its output layer.
        drafter_path: likewise, of the model that is to guess.
        drafter_vocab_size: likewise.

    Raises:
        UnsupportedModelError: names both sizes, or the first token that differs.
    """
    pair = f"speculation.model {drafter_path!r} cannot guess for {path!r}"
    if vocab_size != drafter_vocab_size:
        raise UnsupportedModelError(
            f"{pair}: it has a vocabulary of {drafter_vocab_size} tokens, the model one of {vocab_size}; both must"
            " have the same"
        )
    own, others = _read_tokens(path), _read_tokens(drafter_path)
    if own is None or others is None:
        unknown = path if own is None else drafter_path
        logger.warning("%s has no tokenizer.json: whether both models have the same tokens is not known", unknown)
        return
    differing = [token_id for token_id in own.keys() | others.keys() if own.get(token_id) != others.get(token_id)]
    if differing:
        token_id = min(differing)
        raise UnsupportedModelError(
            f"{pair}: token {token_id} is {_shown(others, token_id)} there and {_shown(own, token_id)} here; both must"
            " have the same vocabulary"
        )


def _read_tokens(path: str) -> Mapping[int, str] | None:
    """By id; None: there is no file that says."""
    file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False) if path else None
    if file is None:
        return None
    content = read_json(path, Path(file))
    # By their ids, or, of a Unigram model, a list of pieces and scores.
    vocabulary = (content.get("model") or {}).get("vocab")
    tokens: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        tokens = {token_id: token for token, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        tokens = {token_id: piece for token_id, (piece, _) in enumerate(vocabulary)}
    return tokens | {added["id"]: added["content"] for added in content.get("added_tokens") or []}


def _shown(tokens: Mapping[int, str], token_id: int) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "missing"
