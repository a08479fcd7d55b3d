"""Command line of the demos."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

from captum_priors._demo import UsageError

DEMOS = {
    "tag": "digits with a tag that gives the label away in training and lies afterwards (default)",
    "sparsity": "tumours, from few patients: fewer measurements carry the prediction",
    "text": "film reviews whose first word gives the label away in training and lies afterwards",
    "stability": "digits under an attack that moves the explanation",
    "noise": "handwriting under noise; needs --data mnist=DIR, which also adds it to 'tag'",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m captum_priors --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a demo; 0 if it went through, 2 if it was called wrongly."""
    try:
        options = _parse(arguments)
        if options.list:
            for name, summary in DEMOS.items():
                print(f"{name:10} {summary}")
        else:
            _run(options)
    except UsageError as error:
        print(f"captum_priors: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m captum_priors",
        description="Train small networks without and with a prior, and compare them.",
    )
    parser.add_argument("demo", nargs="?", choices=DEMOS, default="tag", help="default: tag")
    parser.add_argument("--list", action="store_true", help="say what the demos are")
    parser.add_argument(
        "--version", action="version", version=f"captum_priors {version('captum_priors')}"
    )
    parser.add_argument(
        "--data",
        default="digits",
        metavar="digits|mnist=DIR",
        help="a folder with MNIST's t10k IDX files, for 'noise'",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("captum-priors-demo"),
        metavar="DIR",
        help="where report.json and the pictures go (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (default: 0)")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: depends on the demo")
    options = parser.parse_args(arguments)
    kind, _, folder = options.data.partition("=")
    if options.data != "digits" and not (kind == "mnist" and folder):
        raise UsageError(f"--data: expected 'digits' or 'mnist=DIR', found {options.data!r}")
    if options.demo == "noise" and not folder:
        raise UsageError("noise: expected --data mnist=DIR, found none")
    if options.epochs is not None and options.epochs < 1:
        raise UsageError(f"--epochs: expected an integer of at least 1, found {options.epochs}")
    options.names = dict.fromkeys([options.demo, *(["noise"] if folder else [])])
    options.folder = Path(folder)
    return options


def _run(options: argparse.Namespace) -> None:
    for name in ("matplotlib", "rich", "sklearn"):
        if find_spec(name) is None:
            raise UsageError(f"the demo needs {name}: run pip install 'captum_priors[demo]'")
    demos = {
        name: import_module(f"captum_priors._demo.{name}").demo(options.folder)
        for name in options.names
    }
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: expected a folder that can be made, found {error}") from None
    reports = [_report(name, demo, options) for name, demo in demos.items()]
    report = reports[0] | {each["demo"]: each for each in reports[1:]}
    path = options.output / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {path}")


def _report(name: str, demo: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Run a demo; print its table and write its picture."""
    from rich.console import Console

    from captum_priors._demo.base import compare, table

    print(f"{name}: {demo.data}.\nprior: {demo.prior}")
    start, epochs = perf_counter(), options.epochs or demo.epochs
    models, figure = compare(demo, options.seed, epochs)
    Console().print(
        table(models, "One seed" if demo.seeds == 1 else f"Means over {demo.seeds} seeds")
    )
    path = options.output / ("report.png" if name == options.demo else f"{name}.png")
    figure.savefig(path, dpi=100)
    print(f"Written: {path}")
    packages = ("captum_priors", "torch", "captum", "numpy")
    return {
        "demo": name,
        "data": demo.data,
        "prior": demo.prior,
        "epochs": epochs,
        "seconds": perf_counter() - start,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "models": models,
    }
