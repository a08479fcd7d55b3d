"""Does `choose_weight` start a search where the best weight is?

Four priors on small tasks of this folder: the pixel prior (BatchNorm network, MNIST under noise),
right for the right reasons (decoy MNIST), the sparsity prior (NHANES I, 100 rows) and a Hessian
penalty (Softplus network, gradient maps under attack). Each is trained at every decade of weights,
which go on while the best is the last; best is the weight with the highest validation score, mean
over the seeds. The proposal is measured after an epoch without the prior, or 50 steps where an
epoch is shorter, and is trained with, too. Nothing was fitted to these tasks: the ratio of .1 and
the epoch are those of ``docs/weight.md`` before this script was written.

    python benchmarks/choose_weight.py --data mnist=DIR --data nhanes=DIR
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist, save, save_plot, show
from _nhanes import load, network, split
from _reproduction import (
    accuracy,
    arguments_of,
    folder_of,
    in_processes,
    roc_auc,
    summary,
)
from _stability import TOP
from _stability import network as strided
from captum.attr import Saliency
from decoy_mnist import decoys
from matplotlib.figure import Figure
from pixel_prior import new_model, salt_and_pepper
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors.attacks import TopKAttack
from captum_priors.metrics import stability_report
from captum_priors.priors import PixelPrior, RightForTheRightReasons, SparsityPrior
from captum_priors.stability import HessianPenalty, smooth_activations
from captum_priors.tuning import choose_weight

WITHIN = 10.0
LEAST_STEPS = 50
MAY_COST = 0.02  # validation accuracy that a Hessian penalty may cost, as in stability_study
BETA, RADIUS, ATTACKED, STEPS = 20.0, 0.05, 30, 15
EPOCHS = 5
N = {"train": 1000, "validation": 500, "test": 1000}
Part = tuple[Tensor, ...]
Score = Callable[[nn.Module, Part], dict[str, float]]


@dataclass(frozen=True)
class Trial:
    """One network with its prior, data and training."""

    model: nn.Module
    prior: Any
    parts: dict[str, Part]  # inputs, targets, and what else the prior is given
    loss: Callable[[Tensor, Tensor], Tensor]
    arguments: Callable[[Part], dict[str, Any]]
    score: Score  # the higher "score", the better
    batch: int
    epochs: int
    keeps_best: bool = False  # epoch, on validation data


def shuffled(source: str, seed: int) -> dict[str, Part]:
    """Images of MNIST and their labels, split by the seed."""
    x, y = mnist(source)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order[: sum(N.values())].split([*N.values()])
    return {name: (x[rows], y[rows]) for name, rows in zip(N, parts, strict=True)}


def pixel(seed: int, sources: dict[str, str]) -> Trial:
    """Accuracy clean, and under Gaussian noise and salt and pepper."""
    parts = {k: (2 * x - 1, y) for k, (x, y) in shuffled(sources["mnist"], seed).items()}
    model = new_model()

    def score(model: nn.Module, part: Part) -> dict[str, float]:
        x, y = part
        generator = torch.Generator().manual_seed(1)
        noisy = [x + s * torch.randn(x.shape, generator=generator) for s in (0.5, 1.0)]
        noisy += [salt_and_pepper(x, share, generator) for share in (0.1, 0.2)]
        found = [accuracy(model, points, y) for points in (x, *noisy)]
        return {"score": statistics.mean(found), "without noise": found[0]}

    return Trial(
        model,
        PixelPrior(model),
        parts,
        F.cross_entropy,
        lambda b: {"inputs": b[0], "target": b[1], "baselines": b[0]},
        score,
        batch=64,
        epochs=EPOCHS,
    )


def right_reasons(seed: int, sources: dict[str, str]) -> Trial:
    """Accuracy where patches of random labels stand."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Part] = {}
    for name, (x, y) in shuffled(sources["mnist"], seed).items():
        told = y if name == "train" else torch.randint(10, (len(y),), generator=generator)
        marked, allowed = decoys(x, told, generator=generator)
        parts[name] = (marked, y, allowed)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 50), nn.ReLU()),
        *(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 10)),
    )
    return Trial(
        model,
        RightForTheRightReasons(model),
        parts,
        F.cross_entropy,
        lambda b: {"inputs": b[0], "annotation": b[2]},
        lambda model, part: {"score": accuracy(model, part[0], part[1])},
        batch=64,
        epochs=15,
    )


@functools.cache
def _nhanes_rows(source: str) -> tuple[Tensor, Tensor]:
    return load(folder_of(source, "nhanes"))


def sparsity(seed: int, sources: dict[str, str]) -> Trial:
    """ROC-AUC; a full batch is an epoch, and the best one on validation rows is kept."""
    data = split(_nhanes_rows(sources["nhanes"]), seed)
    model = network(data.train[0].shape[1], (512, 128, 32))

    @torch.no_grad()
    def score(model: nn.Module, part: Part) -> dict[str, float]:
        return {"score": roc_auc(model(part[0]), part[1])}

    return Trial(
        model,
        SparsityPrior(model),
        {"train": data.train, "validation": data.validation, "test": data.test},
        lambda outputs, y: F.binary_cross_entropy_with_logits(outputs[:, 0], y),
        lambda b: {"inputs": b[0], "target": 0, "baselines": b[0]},
        score,
        batch=100,
        epochs=100,
        keeps_best=True,
    )


def hessian(seed: int, sources: dict[str, str]) -> Trial:
    """Top-50 pixels kept under attack, where the accuracy qualifies."""
    ball: dict[str, Any] = {"radius": RADIUS, "lower_bound": 0.0, "upper_bound": 1.0, "seed": 0}
    model = smooth_activations(strided(), BETA)

    def score(model: nn.Module, part: Part) -> dict[str, float]:
        explainer = Saliency(model)
        report = stability_report(
            {"model": explainer},
            {"model": {"attack": TopKAttack(explainer, TOP, step_num=STEPS, **ball)}},
            DataLoader(TensorDataset(*(t[:ATTACKED] for t in part)), batch_size=ATTACKED),
            k=TOP,
        )
        kept = report.row(attack="attack").scores[f"top-{TOP}"].mean
        return {"score": kept, "accuracy": accuracy(model, *part)}

    return Trial(
        model,
        HessianPenalty(model),
        shuffled(sources["mnist"], seed),
        F.cross_entropy,
        lambda b: {"inputs": b[0], "target": b[1]},
        score,
        batch=64,
        epochs=EPOCHS,
    )


TASKS: dict[str, tuple[Callable[[int, dict[str, str]], Trial], tuple[float, ...], int]] = {
    "pixel prior": (pixel, (1e-5, 1e-4, 1e-3, 1e-2), 3),
    "right for the right reasons": (right_reasons, (1.0, 1e1, 1e2, 1e3), 3),
    "sparsity": (sparsity, (1e-2, 1e-1, 1.0, 1e1), 8),
    "Hessian penalty": (hessian, (1e-4, 1e-3, 1e-2, 1e-1), 3),
}
"""Trial, the weights that a sweep begins with, and seeds: many splits where 100 rows validate."""


def batches(trial: Trial) -> list[Part]:
    """Shuffle the training part into batches."""
    order = torch.randperm(len(trial.parts["train"][0])).split(trial.batch)
    return [tuple(t[rows] for t in trial.parts["train"]) for rows in order]


def train(trial: Trial, weight: float, epochs: int) -> None:
    """Adam, with cosine decay to zero over the epochs of the trial."""
    model, n = trial.model, len(trial.parts["train"][0])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    steps = trial.epochs * math.ceil(n / trial.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = -1.0, None
    for _ in range(epochs):
        model.train()
        for batch in batches(trial):
            loss = trial.loss(model(batch[0]), batch[1])
            if weight:
                loss = loss + weight * trial.prior(**trial.arguments(batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if trial.keeps_best:
            score = trial.score(model.eval(), trial.parts["validation"])["score"]
            if score > best:
                best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}
    if kept is not None:
        model.load_state_dict(kept)


def run(job: tuple[str, int, float], sources: dict[str, str], scale: float) -> dict[str, Any]:
    """Train one task with one seed and weight, and score it."""
    name, seed, weight = job
    torch.manual_seed(seed)
    trial = TASKS[name][0](seed, sources)
    train(trial, weight, max(1, round(scale * trial.epochs)))
    trial.model.eval()
    return {p: trial.score(trial.model, trial.parts[p]) for p in ("validation", "test")}


def propose(job: tuple[str, int], sources: dict[str, str]) -> dict[str, float]:
    """Weights that are proposed before training, and after an epoch or 50 steps without a prior."""
    name, seed = job
    found = {}
    for state in ("start", "early"):
        torch.manual_seed(seed)
        trial = TASKS[name][0](seed, sources)
        if state == "early":
            per_epoch = math.ceil(len(trial.parts["train"][0]) / trial.batch)
            epochs = math.ceil(max(per_epoch, LEAST_STEPS) / per_epoch)
            train(replace(trial, keeps_best=False), 0.0, epochs)
        trial.model.train()
        report = choose_weight(
            trial.model,
            functools.partial(loss_of, trial),
            trial.prior,
            batches(trial),
            prior_arguments=trial.arguments,
        )
        found[state] = report.weight
    return found


def loss_of(trial: Trial, batch: Part) -> Tensor:
    """Loss without the prior."""
    return trial.loss(trial.model(batch[0]), batch[1])


# ---- The sweep ------------------------------------------------------------------------------

Runs = dict[float, list[dict[str, dict[str, float]]]]


def mean(runs: Runs, weight: float, part: str, key: str = "score") -> float:
    """Mean over the seeds."""
    return statistics.mean(each[part][key] for each in runs[weight])


def qualifying(runs: Runs) -> list[float]:
    """Weights above zero that cost no more accuracy than they may, where that is looked at."""
    weights = sorted(w for w in runs if w)
    if "accuracy" not in runs[0.0][0]["validation"]:
        return weights
    least = mean(runs, 0.0, "validation", "accuracy") - MAY_COST
    fine = [w for w in weights if mean(runs, w, "validation", "accuracy") >= least]
    return fine or weights[:1]


def best_of(runs: Runs) -> float:
    """Weight with the highest validation score among those that qualify."""
    return max(qualifying(runs), key=lambda w: mean(runs, w, "validation"))


def as_good(runs: Runs, best: float) -> list[float]:
    """Weights whose validation score is within a standard error of the best one's, in pairs."""
    found = []
    for weight in qualifying(runs):
        pairs = zip(runs[best], runs[weight], strict=True)
        gaps = [a["validation"]["score"] - b["validation"]["score"] for a, b in pairs]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
        if statistics.mean(gaps) <= error:
            found.append(weight)
    return found


def sweep(name: str, weights: tuple[float, ...], over: Callable[[list[float]], Runs]) -> Runs:
    """Train at each decade, and on beyond the ends while the best is the last, at most twice."""
    runs = over([0.0, *weights])
    for _ in range(2):
        best, tried = best_of(runs), [w for w in runs if w]
        more = {min(tried): best / 10, max(tried): best * 10}.get(best)
        if more is None:
            break
        print(f"{name}: {best:g} is the last, on to {more:g}", flush=True)
        runs |= over([float(f"{more:.0e}")])
    return runs


def judged(runs: Runs, proposals: list[dict[str, float]], at_proposal: Runs) -> dict[str, Any]:
    """Compare the proposal with the best weight."""
    best = best_of(runs)
    proposed = {s: statistics.median(p[s] for p in proposals) for s in ("start", "early")}
    factor = proposed["early"] / best
    return {
        "best weight": best,
        "as good as the best": as_good(runs, best),
        "proposed": proposed,
        "proposed with each seed": proposals,
        "proposed over best": factor,
        "within": 1 / WITHIN <= factor <= WITHIN,
        "test": {
            name: summary([each["test"] for each in found])
            for name, found in {
                "no prior": runs[0.0],
                "best": runs[best],
                "proposed": next(iter(at_proposal.values())),
            }.items()
        },
        "by weight": {f"{w:g}": runs[w] for w in sorted(runs)},
    }


def draw(results: dict[str, Any]) -> Figure:
    """Validation score by weight, with what was proposed."""
    figure = Figure(figsize=(11, 6))
    for axes, (name, row) in zip(figure.subplots(2, 2).flat, results.items(), strict=True):
        found = {
            float(w): summary([r["validation"] for r in each])["score"]
            for w, each in row["by weight"].items()
        }
        weights = [w for w in found if w]
        axes.errorbar(
            weights, [found[w]["mean"] for w in weights], [found[w]["stdev"] for w in weights]
        )
        axes.axhline(found[0.0]["mean"], linestyle=":", label="no prior")
        axes.axvline(row["proposed"]["early"], linestyle="--", label="proposed")
        axes.set(xscale="log", title=name, xlabel="weight", ylabel="validation score")
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def seeds_of(name: str, options: argparse.Namespace) -> range:
    """Seeds of a task."""
    return range(options.seeds or (1 if options.quick else TASKS[name][2]))


def one_task(name: str, options: argparse.Namespace, sources: dict[str, str]) -> dict[str, Any]:
    """Sweep, propose, and train with the proposal."""
    weights, seeds = TASKS[name][1], seeds_of(name, options)
    scale = 0.2 if options.quick else 1.0

    def over(weights: list[float]) -> Runs:
        return {w: [run((name, s, w), sources, scale) for s in seeds] for w in weights}

    proposals = [propose((name, seed), sources) for seed in seeds]
    print(f"{name}: proposed {proposals}", flush=True)
    at_proposal = over([statistics.median(p["early"] for p in proposals)])
    return judged(
        sweep(name, weights[1:3] if options.quick else weights, over), proposals, at_proposal
    )


def main() -> None:
    """Run all four."""
    arguments = arguments_of(__doc__)
    arguments.add_argument("--data", action="append", required=True, help="mnist=DIR, nhanes=DIR")
    options = arguments.parse_args()
    sources = {source.partition("=")[0]: source for source in options.data}
    if set(sources) != {"mnist", "nhanes"}:
        raise SystemExit("--data: expected mnist=DIR and --data nhanes=DIR.")
    one = functools.partial(one_task, options=options, sources=sources)
    results = dict(zip(TASKS, in_processes(one, TASKS, options.jobs), strict=True))
    rows = []
    for name, row in results.items():
        test = (row["test"][k]["score"]["mean"] for k in ("no prior", "best", "proposed"))
        good, proposed = row["as good as the best"], row["proposed"]
        rows.append(
            [
                *(name, row["best weight"], f"{min(good):g} to {max(good):g}"),
                *(proposed["start"], proposed["early"], row["proposed over best"], *test),
            ]
        )
    show(
        "Best weight and proposal; test scores",
        ["", "best", "as good", "at start", "proposed", "/ best", "none", "at best", "at proposal"],
        rows,
    )
    settings = vars(options) | {"data": "mnist=DIR, nhanes=DIR", "sizes": N, "radius": RADIUS}
    settings["seeds"] = {name: len(seeds_of(name, options)) for name in TASKS}
    save(options.output, "choose_weight", settings, results)
    save_plot(options.output, "choose_weight", draw(results))


if __name__ == "__main__":
    main()
