"""Do the largest gradients stay the largest? R2ET (Wang et al. 2024) on small digits, attacked.

A network of two hidden layers with Softplus on scikit-learn's digits (8 x 8). Gradient maps are
attacked (the top 8 pixels driven out, prediction kept, radius .1) and compared with noise of that
size. R2ET without its curvature and with it, the Hessian penalty and weight decay each have four
settings, of which validation images choose, with the first seed, the one that keeps most of the
top 8 among those that cost at most a point of accuracy. The expected confidence less accuracy says
what larger logits, which widen the gap, too, have done to calibration.

    python benchmarks/ranked_gradients.py
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from _common import save, save_plot
from _reproduction import accuracy, arguments_of, in_processes, seeds_of, show_runs, summary
from captum.attr import Saliency
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.metrics import stability_report
from captum_priors.stability import R2ET, HessianPenalty, weight_decay_groups

TOP, RADIUS, EPOCHS, MAY_COST = 8, 0.1, 30, 0.01
SIZES = {"train": 1000, "validation": 300, "test": 497}
SETTINGS: dict[str, tuple[float, ...]] = {
    "no prior": (0.0,),
    "weight decay": (0.1, 0.3, 1.0, 3.0),
    "Hessian": (0.001, 0.01, 0.1, 1.0),
    "R2ET, no curvature": (0.03, 0.1, 0.3, 1.0),
    "R2ET": (0.01, 0.03, 0.1, 0.3),
}
Batch = tuple[Tensor, Tensor]


def digits() -> dict[str, Batch]:
    """Images in [0, 1], always in the same parts."""
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16).float(), torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.split([*SIZES.values()])
    return {name: (x[rows], y[rows]) for name, rows in zip(SIZES, parts, strict=True)}


def prior_of(name: str, model: nn.Module, weight: float) -> Any:
    """Make the weighted prior, or None."""
    if name == "Hessian":
        return weight * HessianPenalty(model)
    if name.startswith("R2ET"):
        return weight * R2ET(model, top_k=TOP, curvature=0.0 if "no" in name else 1.0)
    return None


def trained(name: str, weight: float, seed: int, data: Batch, epochs: int) -> nn.Module:
    """Train one network; all methods have the same start and order."""
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 64), nn.Softplus(10), nn.Linear(64, 64), nn.Softplus(10))
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    prior, (x, y) = prior_of(name, model, weight), data
    decay = weight if name == "weight decay" else 0.0
    optimizer = torch.optim.AdamW(weight_decay_groups(model, decay), 3e-3)
    torch.manual_seed(1000 + seed)
    orders = [torch.randperm(len(x)).split(64) for _ in range(epochs)]
    for rows in (rows for order in orders for rows in order):
        loss = F.cross_entropy(model(x[rows]), y[rows])
        if prior is not None:
            loss = loss + prior(x[rows], target=y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model


def figures(model: nn.Module, data: Batch, n: int) -> dict[str, float]:
    """Accuracy, and what is left of the top pixels of the first images."""
    explainer = Saliency(model)
    ball: dict[str, Any] = {"radius": RADIUS, "lower_bound": 0.0, "upper_bound": 1.0, "seed": 0}
    moved = {
        "noise": RandomAttack(explainer, **ball),
        "attack": TopKAttack(explainer, TOP, step_num=30, **ball),
    }
    loader = DataLoader(TensorDataset(*(t[:n] for t in data)), batch_size=n)
    report = stability_report({"model": explainer}, {"model": moved}, loader, k=TOP)
    with torch.no_grad():
        p = model(data[0]).softmax(1).amax(1)
    right = accuracy(model, *data)
    left = {f"top-{TOP}, {m}": report.row(attack=m).scores[f"top-{TOP}"].mean for m in moved}
    return {"accuracy": right, **left, "confidence - accuracy": float(p.mean()) - right}


def tried(setting: tuple[str, float, int], part: str, epochs: int, n: int) -> dict[str, float]:
    """Train and measure one setting."""
    data = digits()
    return figures(trained(*setting, data["train"], epochs), data[part], n)


def main() -> None:
    """Choose each method's weight, then run all seeds."""
    options = arguments_of(__doc__).parse_args()
    seeds = seeds_of(options, full=3, quick=1)
    epochs, n = (2, 20) if options.quick else (EPOCHS, 100)
    settings = {name: ws[:1] if options.quick else ws for name, ws in SETTINGS.items()}
    pairs = [(name, w, 0) for name, ws in settings.items() for w in ws]
    run = functools.partial(tried, epochs=epochs, n=n)
    search = in_processes(functools.partial(run, part="validation"), pairs, options.jobs)
    found = dict(zip(pairs, search, strict=True))
    least = found["no prior", 0.0, 0]["accuracy"] - MAY_COST
    best = {}
    for name, weights in settings.items():
        fine = [w for w in weights if found[name, w, 0]["accuracy"] >= least]
        # Where none qualifies, the lightest is reported for what it is.
        best[name] = max(fine or weights[:1], key=lambda w: found[name, w, 0][f"top-{TOP}, attack"])
    pairs = [(name, w, seed) for name, w in best.items() for seed in seeds]
    each = in_processes(functools.partial(run, part="test"), pairs, options.jobs)
    runs: dict[str, list[dict[str, float]]] = {}
    for (name, _, _), row in zip(pairs, each, strict=True):
        runs.setdefault(name, []).append(row)
    show_runs("digits, test images", runs)
    results = {
        "found": {name: summary(rows) for name, rows in runs.items()},
        "weights": best,
        "runs": runs,
        "tried": {f"{name}, weight {w:g}": row for (name, w, _), row in found.items()},
    }
    save(options.output, "ranked_gradients", {**vars(options), "seeds": [*seeds]}, results)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for i, key in enumerate((f"top-{TOP}, noise", f"top-{TOP}, attack")):
        means, stdev = ([r[key][k] for r in results["found"].values()] for k in ("mean", "stdev"))
        axes.barh([j + 0.4 * i for j in range(len(runs))], means, 0.4, xerr=stdev, label=key)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.legend()
    save_plot(options.output, "ranked_gradients", figure)


if __name__ == "__main__":
    main()
