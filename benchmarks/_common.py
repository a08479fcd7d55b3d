"""What the benchmarks share: arguments, timing, tables, and results with their versions."""

import argparse
import gc
import gzip
import json
import platform
import random
import statistics
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import captum
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import captum_priors

mpl.use("Agg")
torch.set_num_threads(1)
# Stock GradientShap and IntegratedGradients say so at every call with plain inputs.
warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")
    arguments.add_argument("--quick", action="store_true", help="fewer settings and repeats")
    return arguments


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float],
    *references: str,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each run in each round, and of each reference the ratio to itself (A/A).

    The runs take turns, so that load on the machine hits all, in an order that changes from round
    to round. A reference takes part twice: how far its ratio to itself is from one is what a ratio
    says where there is nothing to say. Python's collector of cycles waits, as in ``timeit``: what
    it looks through is not the run's.
    """
    turns = {**runs, **{f"{name}, again": runs[name] for name in references}}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample([*turns], len(turns)):
            gc.disable()
            start = clock()
            turns[name]()
            seconds[name].append(clock() - start)
            gc.enable()
    again = {}
    for name in references:
        ratios = [a / b for a, b in zip(seconds.pop(f"{name}, again"), seconds[name], strict=True)]
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        again[name] = {"median": median, "quartiles": [low, high], "rounds": rounds}
    return seconds, again


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; numbers to three significant digits."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(_cell, row))
    Console(width=max(100, 17 * len(columns))).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # a ratio to itself
        return "{:.2f} ({:.2f} to {:.2f})".format(value["median"], *value["quartiles"])
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(output: Path, name: str, settings: dict[str, Any], results: Any) -> None:
    """Write settings, versions and figures as JSON."""
    output.mkdir(parents=True, exist_ok=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "captum": captum.__version__,
        "captum_priors": captum_priors.__version__,
        "threads": torch.get_num_threads(),
        # with a plus where files differ from it
        "commit": _first_line("git", "-C", str(RESULTS), "describe", "--always", "--dirty=+"),
        "processor": _first_line("sed", "-n", "s/^model name.*: //p", "/proc/cpuinfo"),
    }
    # where code and data lay is nobody's business
    settings = {k: "DIR" if isinstance(v, Path) else v for k, v in settings.items()}
    settings.pop("output", None)
    settings.setdefault("seeds", 1)  # of what takes none: all is drawn with seed 0
    if "data" in settings:
        settings["data"] = str(settings["data"]).partition("=")[0] + "=DIR"
    document = {"benchmark": name, "settings": settings, "versions": versions, "results": results}
    (output / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def _first_line(*command: str) -> str:
    """What a command says first, or nothing where it cannot be run."""
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    except OSError:
        found = ""
    return found.partition("\n")[0]


def save_plot(output: Path, name: str, figure: Figure) -> None:
    """Write a figure."""
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / f"{name}.png", dpi=120, bbox_inches="tight")


def mnist(source: str) -> tuple[Tensor, Tensor]:
    """Read the images of MNIST's test file in [0, 1], and their labels, from ``mnist=DIR``."""
    kind, _, folder = source.partition("=")
    if kind != "mnist" or not folder:
        raise SystemExit(f"--data: expected mnist=DIR, found {source!r}.")
    images = read_idx(Path(folder), "t10k-images-idx3-ubyte").unsqueeze(1).float() / 255
    return images, read_idx(Path(folder), "t10k-labels-idx1-ubyte").long()


def read_idx(folder: Path, name: str) -> Tensor:
    """Read one IDX file of bytes, gzipped or not."""
    packed = folder / f"{name}.gz"
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    return torch.from_numpy(values.reshape(shape.tolist()).copy())
