"""Plays a trace on fixed, planned and Serve-scaled pools: `python -m deployments.simulator TRACE`.

TRACE is a CSV as `load_tests/trace.py` has it, or JSON lines of the Mooncake paper. `--advise` looks for the cheapest
fixed pools that keep the bounds. The curves are Llama-3.1-8B's on an H100, as measured; `--slower` makes the engines as
many times slower, each field of a JSON object in `--curves` replaces a figure. `--kinds` is a JSON object of kinds of
GPU by name, each with `cost` of an hour and figures that replace those of the curves: each pool may be of another kind.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# What to do where a package is missing.
MISSING = "install the extra `simulator`: pip install -e '.[simulator]'"
MAX_REPLICAS = 10_000
_DAY_S = 86_400.0
_IMAGES = ".png", ".svg", ".pdf"


def number(least: float, most: float) -> Callable[[str], float]:
    """A type of argument: a number within bounds; of `nan` nothing is within."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least:,g} to {most:,g}")
        return value

    return check


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type of argument: a whole number within bounds."""

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least:,} to {most:,}")
        return value

    return check


def pools(least_decode: int, example: str) -> Callable[[str], tuple[int, int]]:
    """A type of argument: replicas of both pools, as P+D."""

    def check(text: str) -> tuple[int, int]:
        counts = [int(part) if part.isdecimal() and len(part) < 10 else -1 for part in text.split("+")]
        is_so = len(counts) == 2 and min(counts) >= 0 and max(counts) <= MAX_REPLICAS and counts[1] >= least_decode
        if not is_so:
            bounds = f"each is at most {MAX_REPLICAS:,}" + (", and D at least 1" if least_decode else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not P+D, as in {example}; {bounds}")
        return counts[0], counts[1]

    return check


def share(text: str) -> float:
    """A type of argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and up to 1, as in 0.95")
    return value


def written(text: str) -> Path:
    """A type of argument: a file that can be written, as far as that is known before."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    return path


def image(text: str) -> Path:
    """A type of argument: a file for a plot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(f"matplotlib is not installed; {MISSING}")
    path = written(text)
    if path.suffix not in _IMAGES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no image that can be written; its name ends in {', '.join(_IMAGES)}"
        )
    return path


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `--help` says the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What the command is to do; ends the process where that contradicts itself."""
    parser = _parser()
    options = parser.parse_args(arguments)
    contradictions = {
        "--only-fixed: there is nothing to play; name pools with --fixed": options.only_fixed and not options.fixed,
        "--only-fixed: nothing is planned of which --reasons could tell": options.only_fixed and options.reasons,
        "--kinds: only --advise chooses from them": options.kinds and not options.advise,
        f"--least: more than --most, which is {options.most}": max(options.least) > options.most,
    }
    for name in ("fixed", "only_fixed", "reasons"):
        given = f"--{name.replace('_', '-')}"
        contradictions[f"{given}: --advise chooses the pools itself"] = options.advise and getattr(options, name)
    for message, is_so in contradictions.items():
        if is_so:
            parser.error(message)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m deployments.simulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("trace", type=Path)
    add("--max-requests", type=whole(1, 10**9), metavar="N", help="of the trace (default: all)")
    seconds, bound = number(0, _DAY_S), number(0.0001, _DAY_S)
    add(
        "--ttft-s", type=bound, default=2.0, metavar="S", help="bound of the time to first token (default: %(default)g)"
    )
    add(
        "--itl-s",
        type=bound,
        default=0.05,
        metavar="S",
        help="bound of 95%% of a request's gaps (default: %(default)g)",
    )
    add("--start-s", type=seconds, default=60.0, metavar="S", help="a replica takes to start (default: %(default)g)")
    most = whole(1, MAX_REPLICAS)
    add("--most", type=most, default=32, metavar="N", help="replicas of each pool (default: %(default)s)")
    least = "replicas of each pool; with 0 it may sleep (default: %(default)s)"
    add("--least", type=pools(0, "0+1"), default="1+1", metavar="P+D", help=least)
    add("--cost", type=number(0, 1e9), default=1.0, help="of a replica and hour (default: %(default)g)")
    slower = "times that a step takes as long as measured (default: %(default)g)"
    add("--slower", type=number(0.001, 1e6), default=1.0, metavar="TIMES", help=slower)
    add("--curves", type=Path, metavar="FILE", help="JSON: other figures, by the names in simulator/curves.py")
    fixed = "fixed pools, played as well; 0+D is colocated (default: none)"
    add("--fixed", nargs="+", type=pools(1, "2+4"), default=[], metavar="P+D", help=fixed)
    add("--advise", type=share, metavar="SHARE", help="find the cheapest pools that keep the bounds")
    add("--kinds", type=Path, metavar="FILE", help="JSON: kinds of GPU to choose from, with --advise")
    fails = "mean time until a replica fails; at least a minute (default: none fails)"
    add("--failure-s", type=number(60, math.inf), default=math.inf, metavar="S", help=fails)
    tier = "that the shared tier holds; 0: there is none (default: %(default)s)"
    add("--tier-tokens", type=whole(0, 10**12), default=0, metavar="N", help=tier)
    remote = "as min_remote_prefill_tokens (default: decided by costs)"
    add("--min-remote-tokens", type=whole(0, 10**9), metavar="N", help=remote)
    add("--serve-routing", action="store_true", help="replicas as Ray Serve chooses them; faster")
    add("--reasons", action="store_true", help="tell each change of the planner's, and why")
    add("--only-fixed", action="store_true", help="neither planned nor as Serve scales; needs --fixed")
    add("--json", type=written, metavar="FILE", help="file to write, figures of each row by its name")
    add("--plot", type=image, metavar="FILE", help=f"image to write; its name ends in {', '.join(_IMAGES)}")
    return parser
