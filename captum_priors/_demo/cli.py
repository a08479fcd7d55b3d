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
    "noise": "handwriting under noise; needs --data mnist=DIR, which also adds it to the others",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m captum_priors --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a demo; 0 if it went through, 2 if it was called wrongly."""
    try:
        options = _parse(arguments)
        if options.list:
            print("\n".join(f"{name:10} {summary}" for name, summary in DEMOS.items()))
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
    add = parser.add_argument
    add("demo", nargs="?", choices=DEMOS, default="tag", help="default: tag")
    add("--list", action="store_true", help="say what the demos are")
    add("--version", action="version", version=f"captum_priors {version('captum_priors')}")
    add("--data", default="digits", metavar="digits|mnist=DIR", help="for 'noise': a folder with "
        "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz")  # fmt: skip
    add("--output", type=Path, default=Path("captum-priors-demo"), metavar="DIR",
        help="where report.json and the pictures go (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="first seed (default: 0)")
    add("--epochs", type=int, metavar="N", help="default: depends on the demo")
    options = parser.parse_args(arguments)
    kind, _, folder = options.data.partition("=")
    if options.data != "digits" and not (kind == "mnist" and folder):
        raise UsageError(f"--data: expected 'digits' or 'mnist=DIR', found {options.data!r}")
    if options.demo == "noise" and not folder:
        raise UsageError("noise: expected --data mnist=DIR, found none")
    if options.epochs is not None and options.epochs < 1:
        raise UsageError(f"--epochs: expected an integer of at least 1, found {options.epochs}")
    options.folder = Path(folder)
    options.names = dict.fromkeys([options.demo, *(["noise"] if folder else [])])
    return options


def _run(options: argparse.Namespace) -> None:
    for needed in ("matplotlib", "sklearn"):
        if find_spec(needed) is None:
            raise UsageError(f"the demo needs {needed}: run pip install 'captum_priors[demo]'")
    demos = {name: import_module(f"captum_priors._demo.{name}") for name in options.names}
    data = {name: demo.load(options.folder) for name, demo in demos.items()}
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: expected a folder that can be made, found {error}") from None
    reports = {name: _report(name, demo, data[name], options) for name, demo in demos.items()}
    report = reports.pop(options.demo) | reports
    path = options.output / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {path}")


def _report(name: str, demo: Any, data: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Run a demo and write its picture."""
    from captum_priors._demo.base import compare

    print(f"{name}: {demo.DATA}.\nprior: {demo.PRIOR}")
    start, epochs = perf_counter(), options.epochs or demo.EPOCHS
    models, figure = compare(demo, data, options.seed, epochs)
    path = options.output / ("report.png" if name == options.demo else f"{name}.png")
    figure.savefig(path, dpi=100)
    print(f"Written: {path}")
    packages = ("captum_priors", "torch", "captum", "numpy")
    return {
        "demo": name,
        "data": demo.DATA,
        "prior": demo.PRIOR,
        "epochs": epochs,
        "seconds": perf_counter() - start,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "models": models,
    }
