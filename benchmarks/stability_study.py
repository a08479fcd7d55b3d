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
run again. IG and SmoothGrad maps of ``--maps`` images are attacked at the ``--maps-radii``.
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
from _stability import METHODS, TOP, Method, Sizes, Study
from _stability_maps import evaluate, fashion, other_maps, robust
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import nn

CHOSEN_AT = (0.05, 0.1)
CHOICE_SEED = 100
"""Settings are chosen for networks of this seed, which are not evaluated."""
MAPS_RADII = (0.02, 0.1)
MAY_COST = 0.02
"""A setting qualifies if it costs at most this much of its start's validation accuracy."""
LOOKS = ("accuracy", "PGD accuracy", "Gini", "mass on the digit")
STARTS = ("standard", "tanh head")
CLAIMS = {
    "weight decay": "Dombrowski et al. 2022: weight decay makes maps more robust",
    "Softplus": "Dombrowski et al. 2022: smooth activations make maps more robust",
    "Softplus + Hessian": "Dombrowski et al. 2022: so does a penalty on the Hessian",
    "ATEX, recipe": "Tang et al. 2022: distillation along maps makes them more stable",
    "ATEX + cross-entropy": "the same, cross-entropy added",
    "R2ET": "Wang et al. 2024: the largest gradients stay the largest",
    "adversarial": "Moshe et al. 2024: more interpretable than standard training",
    "sensitivity": "Fidel et al. 2020, Moshe et al. 2024: the same, calm neurons",
    "sensitivity + Jacobian": "the same, with their Jacobian penalty",
    "sensitivity - adversarial": "Moshe et al. 2024: calm neurons more than adversarial training",
    "sensitivity + Jacobian - adversarial": "the same, with their Jacobian penalty",
}
MAPPED = ("standard", "sensitivity", "tanh head", "ATEX, recipe")
"""Whose maps by IG and SmoothGrad are attacked, too."""
COMPARED = ("adversarial", "sensitivity", "sensitivity + Jacobian")
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


def best_of(tried: list[Found], least: float, at: Iterable[float] = CHOSEN_AT) -> Found:
    """The stablest of those that are accurate enough; the most accurate where none is."""
    fine = [each for each in tried if each["accuracy"] >= least]
    if not fine:
        return max(tried, key=lambda each: each["accuracy"])
    return max(fine, key=lambda each: sum(each[f"attack {r}"] for r in at))


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
    for _ in range(1 if quick else 3):
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
    alone = {f"best at {r}": best_of(tried, least, (r,)) for r in CHOSEN_AT}
    named = {key: {n: each[n] for n in axes} for key, each in alone.items()}
    return {"setting": setting, **named, "least accuracy": least, "tried": tried}


# ---- Figures ----------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> Found:
    """Mean, standard deviation, and the values by seed."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "stdev": spread, "values": [*values]}


def summaries(found: dict[str, list[Found]]) -> dict[str, dict[str, Found]]:
    """The same for each method and column."""
    return {
        name: {column: summary([run[column] for run in runs]) for column in runs[0]}
        for name, runs in found.items()
    }


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
    pairs = {name: (name, METHODS[name].start) for name in found if name not in STARTS}
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


def verdict(gain: dict[str, Found], columns: Iterable[str]) -> str:
    """Where the interval lies above zero, where below, and where it has both signs."""
    words: dict[str, list[str]] = {"more": [], "less": [], "open": []}
    for column in columns:
        each = gain[column]
        sure = abs(each["mean"]) > each["half width"]
        word = ("more" if each["mean"] > 0 else "less") if sure else "open"
        words[word].append(column.removeprefix("attack ").removeprefix("noise "))
    return "; ".join(f"{word}: {', '.join(at)}" for word, at in words.items() if at)


def claims(gain: dict[str, dict[str, Found]], radii: Sequence[float]) -> list[dict[str, str]]:
    """One row for each claim of a paper."""
    return [
        {
            "method": name,
            "claim": claim,
            "ours": ", ".join(f"{gain[name][f'attack {r}']['mean']:+.3f}" for r in radii),
            "under attack": verdict(gain[name], [f"attack {r}" for r in radii]),
            "under noise": verdict(gain[name], [f"noise {r}" for r in radii]),
            "looks": verdict(gain[name], LOOKS),
        }
        for name, claim in CLAIMS.items()
        if name in gain
    ]


def grids(study: Study, kept: Kept, chosen: dict[str, Found]) -> dict[str, list[Found]]:
    """What was tried of sensitivity and adversarial training, trained in full, with one seed."""

    def trained_with(name: str, setting: dict[str, float]) -> Found:
        model = METHODS[name].train(study, 0, **setting)
        return {**setting, **evaluate(study, model, "test", CHOSEN_AT)}

    found: dict[str, list[Found]] = {}
    for name in COMPARED if COMPARED[0] in chosen else ():
        found[name] = []
        for each in chosen[name]["tried"]:
            setting = {n: each[n] for n in METHODS[name].axes}
            label = ", ".join(f"{n} {v:.3g}" for n, v in setting.items())
            run = functools.partial(trained_with, name, setting)
            found[name].append(kept(f"grid, {study.sizes.images} images, {name}, {label}", run))
    return found


def interpretability(grid: dict[str, list[Found]]) -> list[Found]:
    """Sensitivity over its settings, beside adversarial training of like accuracy."""
    columns = ("accuracy", "Gini", "mass on the digit", *(f"attack {r}" for r in CHOSEN_AT))
    rows = []
    for name in COMPARED[1:] if grid else ():
        for each in grid[name]:
            nearest = min(
                grid["adversarial"], key=lambda other: abs(other["accuracy"] - each["accuracy"])
            )
            setting = {n: each[n] for n in METHODS[name].axes}
            row = {"method": name, **setting, **{c: each[c] for c in columns}}
            row["adversarial of nearest accuracy"] = {c: nearest[c] for c in ("radius", *columns)}
            rows.append(row)
    return rows


def draw(found: dict[str, list[Found]], radii: Sequence[float]) -> Figure:
    """Draw top-50 intersections over the radius, under noise and under attack."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("noise", "attack"), strict=True):
        for i, (name, runs) in enumerate(found.items()):
            means = [statistics.mean(run[f"{kind} {r}"] for run in runs) for r in radii]
            style = f"C{i % 10}{'-s' if i < 10 else ':o'}"
            style = "k-" if name == "standard" else "k--" if name == "tanh head" else style
            axes.plot(radii, means, style, label=name, markersize=3)
        axes.set_xscale("log")
        axes.set_xticks(radii, [f"{r:g}" for r in radii])
        axes.set_xlabel(f"radius, {kind}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.axes[0].set_ylabel(f"top {TOP} that stay")
    return figure


def trained(study: Study, name: str, seed: int, setting: dict[str, float]) -> nn.Module:
    """Train a method, or take it from where ATEX has started from it."""
    return METHODS[name].train(study, seed, **setting) if setting else study.start(name, seed)


def all_figures(study: Study, get: Callable[[], nn.Module]) -> dict[str, float]:
    """Evaluate on test images."""
    model = get()
    found = evaluate(study, model, "test", study.sizes.radii)
    return {**found, "PGD accuracy": robust(model, study.data["test"])}


def maps_of(
    study: Study, get: Callable[[], nn.Module], images: int, radii: Sequence[float]
) -> dict[str, float]:
    """Evaluate IG and SmoothGrad."""
    return other_maps(get(), study, images, radii)


def everything(
    chosen: dict[str, Found],
    found: dict[str, list[Found]],
    grid: dict[str, list[Found]],
    maps: dict[str, list[Found]],
    radii: Sequence[float],
) -> Found:
    """Summaries, paired differences and verdicts."""
    return {
        "found": summaries(found),
        "gains": gains(found),
        "claims": claims(gains(found), radii),
        "grid": grid,
        "interpretability": interpretability(grid),
        "chosen": chosen,
        "other maps": summaries(maps),
        "gains, other maps": gains(maps),
    }


def print_all(document: Found, radii: Sequence[float]) -> None:
    """Print tables of means and standard deviations, and the claims."""
    for title, columns in {
        "Networks, and looks of maps": LOOKS,
        f"Top {TOP} that stay under noise": [f"noise {r}" for r in radii],
        f"Top {TOP} that stay under attack": [f"attack {r}" for r in radii],
    }.items():
        rows = [
            [name, *(f"{each[c]['mean']:.3f} ± {each[c]['stdev']:.3f}" for c in columns)]
            for name, each in document["found"].items()
        ]
        show(title, ["method", *columns], rows)
    rows = [[*row.values()] for row in document["claims"]]
    show("Claims", ["method", "claim", "ours", "under attack", "under noise", "looks"], rows)


def main() -> None:
    """Choose, train, attack, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", action="append", required=True, help="mnist=DIR")
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--images", type=int, default=200, help="attacked")
    arguments.add_argument("--restarts", type=int, default=1, help="of each attack")
    arguments.add_argument("--maps", type=int, default=100, help="images for IG and SmoothGrad")
    arguments.add_argument("--maps-radii", type=float, nargs="+", default=[*MAPS_RADII])
    arguments.add_argument("--fashion-images", type=int, default=900, help="of 900")
    arguments.add_argument("--parts", type=Path, default=None, help="folder for what is finished")
    options = arguments.parse_args()
    sources = {source.partition("=")[0]: source for source in options.data}
    kept = Kept(options.parts)
    sizes = Sizes(images=options.images, n_restarts=options.restarts)
    short = Sizes(train=3500, epochs=1, batch=32, atex_steps=60, images=40, step_num=10)
    if options.quick:
        for name, most in (("seeds", 2), ("images", 20), ("maps", 3), ("fashion_images", 90)):
            setattr(options, name, min(most, getattr(options, name)))
        short = Sizes(train=1000, epochs=1, batch=32, atex_steps=5, images=10, step_num=3)
        sizes = dataclasses.replace(short, images=options.images, step_num=5, radii=CHOSEN_AT)
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
    networks: dict[tuple[int, str], Callable[[], nn.Module]] = {}
    last = ["R2ET", *(name for name, method in METHODS.items() if method.fixed)]
    # All seeds of what is compared first, then of the others one by one.
    runs = sorted(
        itertools.product(range(options.seeds), METHODS),
        key=lambda run: last.index(run[1]) if run[1] in last else -1,
    )
    for seed, name in runs:
        setting = {**METHODS[name].fixed, **chosen.get(name, {}).get("setting", {})}
        train = functools.partial(trained, study, name, seed, setting)
        get = functools.partial(kept.network, f"network, {seed}, {name}", train)
        networks[seed, name] = get
        run = functools.partial(all_figures, study, get)
        part = f"found, {options.images} images, {seed}, {name}"
        found.setdefault(name, []).append(kept(part, run))
    authors: Found = {}
    if "atex_fashion" in sources:
        folder = Path(sources["atex_fashion"].partition("=")[2])
        run = functools.partial(fashion, folder, study.sizes, options.fashion_images)
        authors["fashion"] = kept(f"fashion, {options.fashion_images} images", run)
    grid = grids(study, kept, chosen)
    maps: dict[str, list[Found]] = {}
    mapped = [name for name in MAPPED if options.maps and name in METHODS]
    for seed, name in itertools.product(range(options.seeds), mapped):
        many, at = options.maps, options.maps_radii
        run = functools.partial(maps_of, study, networks[seed, name], many, at)
        where = "" if at == [*MAPS_RADII] else f" at {at}"
        part = f"maps, {many} images{where}, {seed}, {name}"
        maps.setdefault(name, []).append(kept(part, run))
    document = {**everything(chosen, found, grid, maps, study.sizes.radii), **authors}
    print_all(document, study.sizes.radii)
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "parts")}
    settings |= {"choice": dataclasses.asdict(short), "sizes": dataclasses.asdict(sizes)}
    save(options.output, "stability_study", settings, document)
    save_plot(options.output, "stability_study", draw(found, study.sizes.radii))


if __name__ == "__main__":
    main()
