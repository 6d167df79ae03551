"""Looks at a model before a server starts, and at the one that is to guess for it, in a process of its own.

Run: `python -m deployments.engine.model.check MODEL [DRAFTER] [--eagle3] [--fp8]`.

To compare the names and shapes of weights with a configuration takes torch and transformers, 3 s of CPU
to load, which the caller spares itself. Called by `app/local_server.py`.
"""

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path

from deployments.engine.model.files import REFUSED, cache_folder, is_cached, local_path
from deployments.engine.model.resolve import resolve_model
from deployments.errors import UnsupportedModelError


def check_weights_of(model: str, *, to_fp8: bool = False) -> str | None:
    """Refuse a model that is here and that no engine would load, without loading it.

    Args:
        model: what the user calls it. A GGUF file is converted, which looks at all of it, and found again by engines. A
            hub's model that is not here yet is left to whoever fetches it.
        to_fp8: engines round its weights to FP8.

    Returns:
        Where it is: a folder, or the id of a hub's model; None: it is not here yet.

    Raises:
        UnsupportedModelError: names what is at fault.
    """
    path = resolve_model(model)
    was_converted = Path(path).parent == cache_folder()
    if was_converted:
        return path
    if local_path(path) is None and not is_cached(path):
        return None
    from deployments.engine.model.checkpoint import check_checkpoint

    check_checkpoint(path, to_fp8=to_fp8)
    return path


def check_pair(model: str, drafter: str, *, to_fp8: bool = False) -> None:
    """The same of both; and refuse them where the one cannot guess for the other.

    Raises:
        UnsupportedModelError: names what is at fault.
    """
    path, drafter_path = (check_weights_of(name, to_fp8=to_fp8) for name in (model, drafter))
    if path is None or drafter_path is None:
        return
    from deployments.engine.model.config import read_config
    from deployments.engine.model.same_vocabulary import check_same_vocabulary

    sizes = [read_config(found).vocab_size for found in (path, drafter_path)]
    check_same_vocabulary(path, sizes[0], drafter_path, sizes[1])


def check_eagle3_pair(model: str, head: str, *, to_fp8: bool = False) -> None:
    """The same of a model and an EAGLE-3 head.

    Raises:
        UnsupportedModelError: names what is at fault.
    """
    path = check_weights_of(model, to_fp8=to_fp8)
    head_path = resolve_model(head)
    if path is None or (local_path(head_path) is None and not is_cached(head_path)):
        return
    from deployments.engine.model.config import read_config
    from deployments.engine.model.eagle3_files import check_eagle3

    check_eagle3(head_path, read_config(path))


def main() -> None:
    """End with the status `REFUSED` for a model that is refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("drafter", nargs="?")
    parser.add_argument("--eagle3", action="store_true", help="what guesses is an EAGLE-3 head")
    parser.add_argument("--fp8", action="store_true", help="weights are to be rounded to FP8")
    logging.basicConfig(level=logging.INFO)
    try:
        options = parser.parse_args()
        if options.drafter is None:
            check_weights_of(options.model, to_fp8=options.fp8)
        else:
            check = check_eagle3_pair if options.eagle3 else check_pair
            check(options.model, options.drafter, to_fp8=options.fp8)
    except UnsupportedModelError:
        traceback.print_exc()
        sys.exit(REFUSED)
    sys.stderr.flush()
    os._exit(0)  # without taking torch down, module by module


if __name__ == "__main__":
    main()
