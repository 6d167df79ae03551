"""Looks at a model before a server starts: `python -m deployments.engine.model.check MODEL`, a process of its own.

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


def check_weights_of(model: str) -> None:
    """Refuse a model that is here and that no engine would load, without loading it.

    Args:
        model: what the user calls it. A GGUF file is converted, which looks at all of it, and found again by engines. A
            hub's model that is not here yet is left to whoever fetches it.

    Raises:
        UnsupportedModelError: names what is at fault.
    """
    path = resolve_model(model)
    was_converted = Path(path).parent == cache_folder()
    if was_converted or (local_path(path) is None and not is_cached(path)):
        return
    from deployments.engine.model.checkpoint import check_checkpoint

    check_checkpoint(path)


def main() -> None:
    """End with the status `REFUSED` for a model that is refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    logging.basicConfig(level=logging.INFO)
    try:
        check_weights_of(parser.parse_args().model)
    except UnsupportedModelError:
        traceback.print_exc()
        sys.exit(REFUSED)
    sys.stderr.flush()
    os._exit(0)  # without taking torch down, module by module


if __name__ == "__main__":
    main()
