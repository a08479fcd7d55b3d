"""Command line of the main job."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from captum_priors._demo.data import UsageError, load

_EPOCHS = {"digits": 40, "mnist": 10}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m captum_priors --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the main job; 0 if it went through, 2 if it was called wrongly."""
    try:
        _run(_parse(arguments))
    except UsageError as error:
        print(f"captum_priors: {error}", file=sys.stderr)
        return 2
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
    parser.add_argument("--epochs", type=int, metavar="N", help="default: depends on the data")
    options = parser.parse_args(arguments)
    if options.epochs is not None and options.epochs < 1:
        raise UsageError(f"--epochs: expected an integer of at least 1, found {options.epochs}")
    return options


def _run(options: argparse.Namespace) -> None:
    for name in ("matplotlib", "rich", "sklearn"):
        if find_spec(name) is None:
            raise UsageError(f"the demo needs {name}: run pip install 'captum_priors[demo]'")
    from captum_priors._demo.comparison import Settings, compare

    images = load(options.data)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: expected a folder that can be made, found {error}") from None
    epochs = options.epochs or _EPOCHS[options.data.partition("=")[0]]
    compare(images, Settings(options.seed, epochs), options.output)
