"""What the reproductions of published experiments share: processes, seeds' spread, and scores."""

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _common import parser, show
from scipy.stats import t as student_t
from torch import Tensor, nn

Run = dict[str, float]


def arguments_of(description: str | None, *, data: str | None = None) -> argparse.ArgumentParser:
    """Arguments of a reproduction: ``--seeds``, ``--jobs`` and, where it reads data, ``--data``."""
    arguments = parser(description)
    if data is not None:
        arguments.add_argument("--data", required=True, help=data)
    arguments.add_argument("--seeds", type=int, default=None, help="seeds, or random splits")
    arguments.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    return arguments


def seeds_of(options: argparse.Namespace, full: int, quick: int) -> range:
    """Seeds to run: what was asked for, or the script's own number, which the options then say."""
    if options.seeds is None:
        options.seeds = quick if options.quick else full
    return range(options.seeds)


def folder_of(source: str, kind: str) -> Path:
    """Read ``kind=DIR``."""
    found, _, folder = source.partition("=")
    if found != kind or not folder:
        raise SystemExit(f"--data: expected {kind}=DIR, found {source!r}.")
    return Path(folder)


def in_processes(function: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> list[Any]:
    """Apply a function to each item, in ``jobs`` processes, each with one thread."""
    items = list(items)
    if jobs == 1 or len(items) == 1:
        return [function(item) for item in items]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, items))


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each figure: mean, standard deviation, standard error of the mean, and every value."""
    found = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        stdev = statistics.stdev(values) if len(values) > 1 else 0.0
        found[key] = {
            "mean": statistics.mean(values),
            "stdev": stdev,
            "error": stdev / math.sqrt(len(values)),
            "values": values,
        }
    return found


def gains(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Summary of the differences within a seed or split, with the half width of its interval."""
    found = summary([{k: a[k] - b[k] for k in a} for a, b in zip(runs, others, strict=True)])
    n = len(runs)
    for each in found.values():
        # 95 %, by Student's t
        each["half width"] = (
            float(student_t.ppf(0.975, n - 1)) * each["error"] if n > 1 else math.inf
        )
    return found


def show_runs(title: str, runs: Mapping[str, Sequence[Run]], *, digits: int = 3) -> None:
    """Print mean ± standard deviation of every figure of every setting."""
    columns = list(next(iter(runs.values()))[0])
    rows = []
    for name, each in runs.items():
        found = summary(each)
        cells = (f"{found[c]['mean']:.{digits}f} ± {found[c]['stdev']:.{digits}f}" for c in columns)
        rows.append([name, len(each), *cells])
    show(title, ["", "runs", *columns], rows)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((model(x).argmax(1) == y).float().mean())


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: share of pairs in the right order, ties counting half."""
    scores, labels = scores.detach().flatten(), labels.flatten().bool()
    _, places, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks = (last - (counts - 1) / 2).double()[places]
    n, m = int(labels.sum()), int((~labels).sum())
    return float((ranks[labels].sum() - n * (n + 1) / 2) / (n * m))
