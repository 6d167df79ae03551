"""`python -m deployments.simulator`: says what is missing before `command.py`, which does the work, needs it."""

import importlib.util
import sys

from deployments.simulator.arguments import MISSING, parse


def main(arguments: list[str] | None = None) -> int:
    """Play, print, and plot."""
    options = parse(arguments)
    if importlib.util.find_spec("simpy") is None:
        print(f"python -m deployments.simulator: error: simpy is not installed; {MISSING}", file=sys.stderr)
        return 2
    from deployments.simulator.command import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
