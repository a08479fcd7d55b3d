"""How far can explanations be moved, and what makes them stable? Curves over the radius, on MNIST.

The 50 most important pixels of a map are driven out by an attack that keeps the prediction, and
moved by random noise of the same size, at radii from .01 to .2. Defences: weight decay, Softplus
instead of ReLU, a Hessian penalty (Dombrowski et al. 2022), ATEX (Tang et al. 2022), activation
sensitivity with and without a Jacobian penalty (after Fidel et al. 2020 and Moshe et al. 2024),
R2ET (Wang et al. 2024), and adversarial training. Each method that has settings is tried with
twelve, and with more where the best lies at an edge, on validation images of a network that takes
no part afterwards; the best by the mean over the radii .05 and .1 is trained from several seeds.
Intervals are Student's, over the seeds, of differences to the network that the method starts from
(same seed, same images). ReLU networks are attacked through Softplus of growing steepness.

    python benchmarks/stability_study.py --data mnist=DIR [--data atex_fashion=DIR]

``atex_fashion``: the two networks that the authors of ATEX saved (``params.pt`` and
``params_advintp.pt`` of DefIntpMan/ATEX) and ``sprite.png``, 30 x 30 images of Fashion-MNIST,
which are evaluated and not trained. With ``--parts FOLDER`` what is finished is kept there, and not
run again; ``--maps N`` also attacks IG and SmoothGrad maps of N images at two radii.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import parser, save, save_plot, show
from _stability import METHODS, TOP, Batch, Method, Sizes, Study, pgd
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.metrics import StabilityReport, gini, spearman, stability_report

CHOSEN_AT = (0.05, 0.1)
CHOICE_SEED = 100
"""Settings are chosen for networks of this seed, which are not evaluated."""
MAY_COST = 0.02
"""A setting qualifies if it costs at most this much of its start's validation accuracy."""
FASHION_RADII = (0.02, 0.04, 0.06, 0.08)
PUBLISHED_FASHION = {  # top-50 in the plot of the authors' code
    "original": (0.70, 0.636, 0.586, 0.545),
    "ATEX": (0.76, 0.688, 0.635, 0.592),
}
CLAIMS = {
    "weight decay": "Dombrowski et al. 2022: weight decay makes maps more robust",
    "Softplus": "Dombrowski et al. 2022: smooth activations make maps more robust",
    "Softplus + Hessian": "Dombrowski et al. 2022: so does a penalty on the Hessian",
    "ATEX, recipe": "Tang et al. 2022: distillation along maps makes them more stable (radius .02-.08)",
    "sensitivity": "Fidel et al. 2020, Moshe et al. 2024: calm neurons, more interpretable maps",
    "sensitivity + Jacobian": "the same with their Jacobian penalty",
    "adversarial": "Moshe et al. 2024: adversarial training, more interpretable than standard",
    "R2ET": "Wang et al. 2024: the top gradients stay on top",
}
Found = dict[str, Any]


class Kept:
    """Results in a folder, so that an interrupted run goes on where it was."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        """What was found under a name before, or is now."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is not None and path.exists():
            return json.loads(path.read_text())
        start = time.process_time()
        found = run()
        print(f"{name}: {time.process_time() - start:.0f} s", flush=True)
        if path is not None:
            path.write_text(json.dumps(found))
        return found

    def network(self, name: str, train: Callable[[], nn.Module]) -> nn.Module:
        """Train a network, or read one of an earlier run."""
        path = None if self.folder is None else self.folder / f"{name}.pt"
        if path is not None and path.exists():
            model: nn.Module = torch.load(path, weights_only=False)  # written here
            return model
        model = train()
        if path is not None:
            torch.save(model, path)
        return model


# ---- Attacks ----------------------------------------------------------------------------------


def attacked(
    explainer: Any, data: Batch, radii: Iterable[float], sizes: Sizes, **options: Any
) -> StabilityReport:
    """Attack the maps of images at each radius, and move them by noise."""
    attacks: dict[str, Any] = {}
    for radius in radii:
        ball: Any = {"radius": radius, "lower_bound": 0.0, "upper_bound": 1.0, "seed": 0}
        attacks[f"noise {radius}"] = RandomAttack(explainer, **ball)
        attacks[f"attack {radius}"] = TopKAttack(
            explainer, TOP, step_num=sizes.step_num, n_restarts=sizes.n_restarts, **ball, **options
        )
    return stability_report(
        {"model": (explainer, options)},
        {"model": attacks},
        DataLoader(TensorDataset(*data), batch_size=100),
        k=TOP,
        metrics={"spearman": spearman},
    )


def curves(report: StabilityReport, radii: Iterable[float]) -> dict[str, float]:
    """Top-k intersections by kind and radius, and the rank correlation under attack."""
    found = {}
    for radius in radii:
        for kind in ("noise", "attack"):
            scores = report.row(attack=f"{kind} {radius}").scores
            found[f"{kind} {radius}"] = scores[f"top-{TOP}"].mean
        found[f"rank correlation {radius}"] = scores["spearman"].mean
    return found


def looks(model: nn.Module, data: Batch) -> dict[str, float]:
    """Sparsity of gradient maps, and their share on the digit."""
    x, y = data
    maps = Saliency(model).attribute(x.clone().requires_grad_(), target=y).detach()
    ink = (x > 0.2).float()
    return {
        "Gini": float(gini(maps).mean()),
        "mass on the digit": float(((maps * ink).sum((1, 2, 3)) / maps.sum((1, 2, 3))).mean()),
    }


def evaluate(study: Study, model: nn.Module, part: str, radii: Sequence[float]) -> dict[str, float]:
    """All figures of one network."""
    data = study.data[part]
    few = (data[0][: study.sizes.images], data[1][: study.sizes.images])
    some = (data[0][:300], data[1][:300])
    return {
        "accuracy": study.accuracy(model, part),
        **looks(model, some),
        **curves(attacked(Saliency(model), few, radii, study.sizes), radii),
    }


def robust(model: nn.Module, data: Batch, radius: float = 0.1) -> float:
    """Accuracy under captum.robust's PGD."""
    x, y = (t[:300] for t in data)
    moved = pgd(model).perturb(x, radius, radius / 4, 10, y)
    with torch.no_grad():
        return float((model(moved).argmax(1) == y).float().mean())


# ---- Settings ---------------------------------------------------------------------------------


def outwards(
    axes: dict[str, Sequence[float]], tried: list[Found], best: Found
) -> list[dict[str, float]]:
    """Settings one step beyond the edges at which the best one lies."""
    found = []
    for name in axes:
        values = sorted({each[name] for each in tried})
        for end, inner in ((values[0], values[1]), (values[-1], values[-2])):
            if best[name] == end:
                found.append({**{n: best[n] for n in axes}, name: end * end / inner})
    return found


def best_of(tried: list[Found], least: float) -> Found:
    """The stablest of those that are accurate enough; the most accurate where none is."""
    fine = [each for each in tried if each["accuracy"] >= least]
    if not fine:
        return max(tried, key=lambda each: each["accuracy"])
    return max(fine, key=lambda each: sum(each[f"attack {r}"] for r in CHOSEN_AT))


def choose(study: Study, kept: Kept, name: str, method: Method, quick: bool) -> Found:
    """Try a method's settings on validation images, and more where the best is at an edge."""

    def tried_with(setting: dict[str, float]) -> Found:
        model = method.train(study, CHOICE_SEED, **setting)
        return {**setting, **evaluate(study, model, "validation", CHOSEN_AT)}

    start = study.start(method.start, CHOICE_SEED)
    least = study.accuracy(start, "validation") - MAY_COST
    axes: Any = {n: v[:2] if quick else v for n, v in method.axes.items()}
    waiting = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    tried: list[Found] = []
    for _ in range(1 if quick else 4):
        for setting in waiting:
            label = ", ".join(f"{n} {v:.3g}" for n, v in setting.items())
            run = functools.partial(tried_with, setting)
            tried.append(kept(f"choice, {name}, {label}", run))
        best = best_of(tried, least)
        known = [{n: each[n] for n in axes} for each in tried]
        waiting = [each for each in outwards(axes, tried, best) if each not in known]
        if not waiting:
            break
    setting = {n: best[n] for n in axes}
    at = {f"best at {r}": max(
        (each for each in tried if each["accuracy"] >= least), default=best,
        key=lambda each: each[f"attack {r}"],
    ) for r in CHOSEN_AT}
    alone = {key: {n: each[n] for n in axes} for key, each in at.items()}
    return {"setting": setting, **alone, "least accuracy": least, "tried": tried}


# ---- Figures ----------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> Found:
    """Mean, standard deviation, and the values by seed."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "stdev": spread, "values": [*values]}


def paired(values: Sequence[float], others: Sequence[float]) -> Found:
    """Mean difference within a seed, with the half width of its 95 % interval."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    n = len(differences)
    half = math.nan
    if n > 1:
        half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return {"mean": statistics.mean(differences), "half width": half}


def gains(found: dict[str, list[Found]]) -> dict[str, dict[str, Found]]:
    """Each method less the network that it starts from, and sensitivity less adversarial."""
    pairs = {n: (n, METHODS[n].start) for n in found if n not in ("standard", "tanh head")}
    for name in ("sensitivity", "sensitivity + Jacobian"):
        pairs[f"{name} - adversarial"] = (name, "adversarial")
    return {
        name: {
            column: paired(*([run[column] for run in found[n]] for n in pair))
            for column in found[pair[0]][0]
        }
        for name, pair in pairs.items()
        if all(n in found for n in pair)
    }


def verdict(gain: dict[str, Found], kind: str, radii: Iterable[float]) -> str:
    """Where the interval lies above zero, where below, and where it has both signs."""
    words: dict[str, list[str]] = {"more": [], "less": [], "open": []}
    for radius in radii:
        each = gain[f"{kind} {radius}"]
        sure = abs(each["mean"]) > each["half width"]
        word = ("more" if each["mean"] > 0 else "less") if sure else "open"
        words[word].append(f"{radius:g}")
    return "; ".join(f"{word} at {', '.join(at)}" for word, at in words.items() if at)


def claims(gain: dict[str, dict[str, Found]], radii: Sequence[float]) -> list[dict[str, str]]:
    """One row for each claim."""
    rows = []
    for name, claim in CLAIMS.items():
        if name in gain:
            moved = ", ".join(f"{gain[name][f'attack {r}']['mean']:+.3f}" for r in radii)
            rows.append(
                {
                    "claim": claim,
                    "method": name,
                    f"ours, top-{TOP} under attack at {', '.join(f'{r:g}' for r in radii)}": moved,
                    "under attack": verdict(gain[name], "attack", radii),
                    "under noise": verdict(gain[name], "noise", radii),
                }
            )
    return rows


def interpretability(chosen: dict[str, Found]) -> list[Found]:
    """Sensitivity over its weight and noise, beside adversarial training of like accuracy."""
    if not {"sensitivity", "adversarial"} <= chosen.keys():
        return []
    others = chosen["adversarial"]["tried"]
    columns = ("accuracy", "Gini", "mass on the digit", *(f"attack {r}" for r in CHOSEN_AT))
    rows = []
    for name in ("sensitivity", "sensitivity + Jacobian"):
        for each in chosen.get(name, {}).get("tried", []):
            nearest = min(others, key=lambda other: abs(other["accuracy"] - each["accuracy"]))
            setting = {n: each[n] for n in METHODS[name].axes}
            row = {"method": name, **setting, **{c: each[c] for c in columns}}
            row["adversarial of nearest accuracy"] = {c: nearest[c] for c in ("radius", *columns)}
            rows.append(row)
    return rows


def fashion(folder: Path, sizes: Sizes, images: int) -> Found:
    """Evaluate the ATEX authors' two networks on images of Fashion-MNIST."""
    pixels = torch.from_numpy(imread(folder / "sprite.png")[..., 0].copy())
    tiles = pixels.reshape(30, 28, 30, 28).permute(0, 2, 1, 3).reshape(900, 1, 28, 28)
    labels = torch.arange(900) // 90
    some = torch.arange(0, 900, 900 // images)
    results: Found = {"images": len(some), "radii": FASHION_RADII, "published": PUBLISHED_FASHION}
    for name, file in (("original", "params.pt"), ("ATEX", "params_advintp.pt")):
        model = authors_network()
        model.load_state_dict(torch.load(folder / file, map_location="cpu", weights_only=True))
        report = attacked(Saliency(model), (tiles[some], labels[some]), FASHION_RADII, sizes)
        with torch.no_grad():
            accuracy = float((model(tiles).argmax(1) == labels).float().mean())
        results[name] = {"accuracy": accuracy}
        for row in report.rows:
            score = row.scores[f"top-{TOP}"]
            results[name][row.attack] = {"mean": score.mean, "low": score.low, "high": score.high}
    return results


def authors_network() -> nn.Sequential:
    """The network whose parameters they saved, under the names they have there."""
    model = nn.Sequential()
    convolutions = [
        layer
        for channels in (1, 32)
        for layer in (nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model.add_module("features", nn.Sequential(*convolutions))
    model.add_module("rows", nn.Flatten())
    head = (nn.Linear(1568, 120), nn.Tanh(), nn.Linear(120, 10))
    model.add_module("fc_model", nn.Sequential(*head))
    return model


def other_maps(model: nn.Module, study: Study, images: int, radii: Sequence[float]) -> Found:
    """The same for IG and SmoothGrad maps, of fewer images."""
    few = tuple(t[:images] for t in study.data["test"])
    smoothgrad = {"nt_type": "smoothgrad", "nt_samples": 10, "stdevs": 0.1}
    kinds: Any = {
        "IG": (IntegratedGradients(model), {"n_steps": 10}),
        "SmoothGrad": (NoiseTunnel(Saliency(model)), smoothgrad),
    }
    return {
        f"{kind}, {column}": value
        for kind, (explainer, options) in kinds.items()
        for column, value in curves(
            attacked(explainer, few, radii, study.sizes, **options), radii
        ).items()
    }


def draw(found: dict[str, list[Found]], radii: Sequence[float]) -> Figure:
    """Draw top-50 intersections over the radius, under noise and under attack."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("noise", "attack"), strict=True):
        for i, (name, runs) in enumerate(found.items()):
            means = [statistics.mean(run[f"{kind} {r}"] for run in runs) for r in radii]
            style = "k-" if name == "standard" else "k--" if name == "tanh head" else f"C{i % 10}o-"
            axes.plot(radii, means, style, label=name, markersize=3)
        axes.set_xscale("log")
        axes.set_xticks(radii, [f"{r:g}" for r in radii])
        axes.set_xlabel(f"radius, {kind}")
    axes.legend(fontsize=8)
    figure.axes[0].set_ylabel(f"top {TOP} that stay")
    return figure


def trained(study: Study, name: str, seed: int, setting: dict[str, float]) -> nn.Module:
    """Train a method, or take it from where ATEX has started from it."""
    return METHODS[name].train(study, seed, **setting) if setting else study.start(name, seed)


def all_figures(study: Study, get: Callable[[], nn.Module]) -> dict[str, float]:
    """Evaluate on test images."""
    start = time.process_time()
    model = get()
    seconds = time.process_time() - start
    found = evaluate(study, model, "test", study.sizes.radii)
    return {**found, "PGD accuracy": robust(model, study.data["test"]), "seconds": seconds}


def report(*_: Any) -> None:
    """Later."""


def main() -> None:
    """Choose, train, attack, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", action="append", required=True, help="mnist=DIR")
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--images", type=int, default=100, help="attacked")
    arguments.add_argument("--restarts", type=int, default=1, help="of each attack")
    arguments.add_argument("--maps", type=int, default=0, help="images for IG and SmoothGrad")
    arguments.add_argument("--fashion-images", type=int, default=300, help="of 900")
    arguments.add_argument("--parts", type=Path, default=None, help="folder for what is finished")
    options = arguments.parse_args()
    sources = {source.partition("=")[0]: source for source in options.data}
    kept = Kept(options.parts)
    sizes = Sizes(images=options.images, n_restarts=options.restarts)
    short = Sizes(train=3500, epochs=1, batch=32, atex_steps=110, images=40, step_num=10)
    if options.quick:
        short = Sizes(train=1000, epochs=1, batch=32, atex_steps=5, images=10, step_num=3)
        sizes = dataclasses.replace(
            short, images=min(20, options.images), step_num=5, radii=(0.02, 0.05, 0.1, 0.2)
        )
    mnist_folder = sources.get("mnist", "")
    trial = Study(mnist_folder, short)
    chosen = {
        name: kept(
            f"chosen, {name}",
            functools.partial(choose, trial, kept, name, method, options.quick),
        )
        for name, method in METHODS.items()
        if method.axes
    }
    study = Study(mnist_folder, sizes)
    found: dict[str, list[Found]] = {}
    maps: dict[str, list[Found]] = {}
    # Softplus of a given steepness comes last: the rest is complete before.
    runs = sorted(
        itertools.product(range(options.seeds), METHODS), key=lambda run: bool(METHODS[run[1]].fixed)
    )
    for seed, name in runs:
        setting = {**METHODS[name].fixed, **chosen.get(name, {}).get("setting", {})}
        train = functools.partial(trained, study, name, seed, setting)
        get = functools.partial(kept.network, f"network, {seed}, {name}", train)
        run = functools.partial(all_figures, study, get)
        found.setdefault(name, []).append(kept(f"found, {seed}, {name}", run))
        if options.maps:
            run = functools.partial(maps_of, study, get, options.maps)
            maps.setdefault(name, []).append(kept(f"maps, {seed}, {name}", run))
    report(options, study.sizes, chosen, found, maps)


if __name__ == "__main__":
    main()
