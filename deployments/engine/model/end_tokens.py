"""Which tokens end a text, as a model's own files say: all that any of them names.

Called when a model is loaded. What the tokenizer says besides is the ingress's to add, for the engine has none.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig

from deployments.errors import UnsupportedModelError, brief

logger = logging.getLogger(__name__)


def read_end_token_ids(path: str, vocab_size: int) -> tuple[int, ...]:
    """End tokens of the model at `path`, from `config.json` and `generation_config.json` together.

    What a file does not say is not made up for by a class's default: `LlamaConfig` has 2, a word of other vocabularies.

    Args:
        path: folder or hub id.
        vocab_size: ids from there on are never drawn: left out, with a warning.

    Raises:
        UnsupportedModelError: a file names something that is no token id, or is there and cannot be read.
    """
    config, _ = PretrainedConfig.get_config_dict(path)
    named = {f"{path}/config.json": config.get("eos_token_id")}
    if isinstance(text_config := config.get("text_config"), dict):
        named[f"{path}/config.json, text_config"] = text_config.get("eos_token_id")
    generation = f"{path}/generation_config.json"
    try:
        named[generation] = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, TypeError, ValueError) as error:
        if Path(generation).exists():
            raise UnsupportedModelError(f"{generation} cannot be read: {brief(error)}") from error
        logger.info("%s has no generation_config.json", path)
    return end_token_ids(named, vocab_size)


def end_token_ids(named: Mapping[str, object], vocab_size: int) -> tuple[int, ...]:
    """Unite what several places name: an id, a list of ids, or None each; 0 is an id like any other.

    Raises:
        UnsupportedModelError: names the place and the value.
    """
    token_ids: set[int] = set()
    for place, value in named.items():
        for token_id in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            if not (type(token_id) is int or (type(token_id) is float and token_id.is_integer())):
                raise UnsupportedModelError(f"{place}: eos_token_id {value!r} is neither an id nor a list of ids")
            if 0 <= token_id < vocab_size:
                token_ids.add(int(token_id))
            else:
                logger.warning("%s: eos_token_id %d is never drawn, ids are 0 to %d", place, token_id, vocab_size - 1)
    return tuple(sorted(token_ids))
