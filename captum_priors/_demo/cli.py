"""Command line of the main job."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from captum_priors._demo.errors import UsageError

_NAMES = ("without prior", "with prior")
# Weight of the prior and epochs for each data set: a weight that costs less than one point of clean
# accuracy; on MNIST from the sweep of benchmarks/pixel_prior.py.
_DEFAULTS = {"digits": (5e-4, 40), "mnist": (5e-4, 10)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m captum_priors --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the main job; 0 if it went through, 2 if it was called wrongly."""
    try:
        options = _parse(arguments)
        _run(options)
    except UsageError as error:
        print(f"captum_priors: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("captum_priors: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m captum_priors",
        description="Train a small convolutional network without and with a pixel attribution "
        "prior, and compare accuracy under noise and attribution maps.",
    )
    parser.add_argument(
        "--data",
        default="digits",
        metavar="digits|mnist=DIR",
        help="scikit-learn's digits (default), or a folder with MNIST's t10k IDX files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("captum-priors-demo"),
        metavar="DIR",
        help="where report.json and report.png go (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--epochs", type=int, default=None, metavar="N", help="default: depends on the data"
    )
    options = parser.parse_args(arguments)
    if options.epochs is not None and options.epochs < 1:
        raise UsageError(f"--epochs: expected an integer of at least 1, found {options.epochs}")
    if not 0 <= options.seed < 2**31:
        raise UsageError(f"--seed: expected an integer from 0 to 2^31 - 1, found {options.seed}")
    existing = next(p for p in (options.output, *options.output.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"--output: expected a folder, found the file {existing}")
    return options


def _run(options: argparse.Namespace) -> None:
    for name in ("matplotlib", "rich", "sklearn"):
        if find_spec(name) is None:
            raise UsageError(f"the demo needs {name}: run pip install 'captum_priors[demo]'")
    from captum_priors._demo.comparison import compare
    from captum_priors._demo.data import load

    images = load(options.data)
    weight, epochs = _DEFAULTS[options.data.partition("=")[0]]
    compare(images, options.output, options.seed, options.epochs or epochs, weight, _NAMES)
