"""Can explanations be manipulated, and what makes them stable? On MNIST.

Gradient maps of a small network are attacked (top-50 pixels driven out, prediction kept) and
compared with random noise of the same size. Defences: Softplus instead of ReLU with a Hessian
penalty and weight decay (Dombrowski et al. 2022), ATEX (Tang et al. 2022), activation sensitivity
(after Fidel et al. 2020 and Moshe et al. 2024), and adversarial training for comparison. Every
setting, and the radius, is chosen on validation images with the first seed; the figures are of test
images, with networks trained from several seeds.

    python benchmarks/stability_study.py --data mnist=DIR
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist, parser, save, save_plot, show
from captum.attr import Saliency
from captum.robust import PGD
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.metrics import StabilityReport, gini, spearman, stability_report
from captum_priors.stability import (
    ATEX,
    ActivationSensitivity,
    HessianPenalty,
    smooth_activations,
    weight_decay_groups,
)

BATCH, TOP = 64, 50
SIZES = {"train": 7000, "validation": 1000, "test": 2000}
BETA = 20.0
PGD_RADIUS = 0.1
# A setting qualifies if it costs at most this much of the standard network's validation accuracy.
MAY_COST = 0.02
Batch = tuple[Tensor, Tensor]
Term = Callable[[Tensor, Tensor], Tensor]


def network() -> nn.Sequential:
    """Two strided convolutions and two linear layers: no pooling, whose kinks nothing smooths."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Study:
    """Data, and one training for each method."""

    def __init__(self, source: str, epochs: int) -> None:
        x, y = mnist(source)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        parts = order.split([*SIZES.values()])
        self.data: dict[str, Batch] = {
            name: (x[rows], y[rows]) for name, rows in zip(SIZES, parts, strict=True)
        }
        self.epochs = epochs
        self.seconds: dict[str, float] = {}

    def fit(
        self,
        model: nn.Module,
        seed: int,
        *,
        term: Term | None = None,
        decay: float = 0.0,
        epochs: int | None = None,
        rate: float = 3e-3,
        prepare: Callable[[Tensor, Tensor], Tensor] = lambda x, y: x,
    ) -> nn.Module:
        """Adam with cosine decay; ``term`` is added to the loss, ``prepare`` makes the inputs."""
        x, y = self.data["train"]
        torch.manual_seed(1000 + seed)
        optimizer = torch.optim.AdamW(weight_decay_groups(model, decay), rate)
        epochs = self.epochs if epochs is None else epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, epochs * -(-len(x) // BATCH)
        )
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(BATCH):
                inputs = prepare(x[rows], y[rows])
                loss = F.cross_entropy(model(inputs), y[rows])
                if term is not None:
                    loss = loss + term(inputs, y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        return model

    @functools.cache  # noqa: B019  # one study for the length of the program
    def standard(self, seed: int) -> nn.Module:
        """Train with cross-entropy alone."""
        torch.manual_seed(seed)
        return self.fit(network(), seed)

    def softplus(self, seed: int, *, weight: float = 0.0) -> nn.Module:
        """Softplus instead of ReLU, with a Hessian penalty where the weight is not zero."""
        torch.manual_seed(seed)
        model = smooth_activations(network(), BETA)
        penalty = HessianPenalty(model)
        term: Term | None = (lambda x, y: weight * penalty(x, target=y)) if weight else None
        return self.fit(model, seed, term=term)

    def weight_decay(self, seed: int, *, decay: float) -> nn.Module:
        """Train with decoupled weight decay."""
        torch.manual_seed(seed)
        return self.fit(network(), seed, decay=decay)

    def atex(self, seed: int, *, radius: float, temperature: float, weight: float) -> nn.Module:
        """Distil the standard network into a copy of itself along its own maps."""
        student = _copy(self.standard(seed))
        prior = ATEX(student, radius=radius, temperature=temperature, n_samples=4)
        return self.fit(
            student, seed, term=lambda x, y: weight * prior(x, target=y), epochs=1, rate=5e-4
        )

    def sensitivity(self, seed: int, *, weight: float, radius: float) -> nn.Module:
        """Train with the activation-sensitivity term."""
        torch.manual_seed(seed)
        model = network()
        relus = [layer for layer in model if isinstance(layer, nn.ReLU)]
        prior = ActivationSensitivity(model, radius, layers=relus)
        return self.fit(model, seed, term=lambda x, _: weight * prior(x))

    def adversarial(self, seed: int, *, radius: float) -> nn.Module:
        """Train on PGD's examples (captum.robust)."""
        torch.manual_seed(seed)
        model = network()
        attack = _pgd(model)
        return self.fit(
            model, seed, prepare=lambda x, y: attack.perturb(x, radius, radius / 3, 5, y).detach()
        )

    def accuracy(self, model: nn.Module, part: str) -> float:
        """Share of right answers."""
        x, y = self.data[part]
        with torch.no_grad():
            return float((model(x).argmax(1) == y).float().mean())

    def report(
        self, model: nn.Module, part: str, radius: float, n: int, steps: int
    ) -> StabilityReport:
        """Attack the gradient maps of the first images of a part."""
        explainer = Saliency(model)
        return stability_report(
            {"model": explainer},
            {"model": attacks(explainer, radius, steps)},
            DataLoader(TensorDataset(*(t[:n] for t in self.data[part])), batch_size=100),
            k=TOP,
            metrics={"spearman": spearman},
            control="noise",
        )

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        """Run, and add up how long it took."""
        start = time.perf_counter()
        result = run()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


def attacks(explainer: Saliency, radius: float, steps: int) -> dict[str, Any]:
    """The attack, and noise of its size."""
    ball: dict[str, Any] = {"radius": radius, "lower_bound": 0.0, "upper_bound": 1.0, "seed": 0}
    return {
        "noise": RandomAttack(explainer, **ball),
        "attack": TopKAttack(explainer, TOP, step_num=steps, **ball),
    }


def _pgd(model: nn.Module) -> PGD:
    loss = functools.partial(F.cross_entropy, reduction="none")
    return PGD(model, loss, lower_bound=0.0, upper_bound=1.0)


def _copy(model: nn.Module) -> nn.Module:
    twin = network()
    twin.load_state_dict(model.state_dict())
    return twin


def grid(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def settings(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """What each method is tried with."""
    decays = [0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5]
    found = {
        "weight_decay": grid(decay=decays),
        "softplus": [{"weight": 0.0}],
        "softplus + hessian": grid(weight=[1e-2, 3e-2, 1e-1]),
        "atex": grid(radius=[0.5, 2.0], temperature=[1.0, 4.0], weight=[0.3, 3.0, 30.0]),
        "sensitivity": grid(weight=[0.0001, 0.001, 0.01], radius=[0.1]),
        "adversarial": grid(radius=[0.05, 0.1]),
    }
    return {name: each[:2] for name, each in found.items()} if quick else found


def choose(study: Study, options: Any) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """Pick the radius for the standard network, then each method's setting, on validation data."""
    n, steps = (20, 10) if options.quick else (50, 30)
    standard = study.standard(0)
    falls = {
        radius: -study.report(standard, "validation", radius, n, steps)
        .row(attack="attack")
        .scores[f"top-{TOP} - control"]
        .mean
        for radius in (0.1, 0.15, 0.2)
    }
    radius = max(falls, key=lambda r: falls[r])
    least = study.accuracy(standard, "validation") - MAY_COST
    chosen, tried = {}, []
    for name, candidates in settings(options.quick).items():
        for setting in candidates:
            model = study.timed(name, functools.partial(train, study, name, 0, setting))
            accuracy = study.accuracy(model, "validation")
            row = study.report(model, "validation", radius, n, steps).row(attack="attack")
            score = row.scores[f"top-{TOP}"].mean
            print(f"{name} {setting}: accuracy {accuracy:.3f}, top-{TOP} {score:.3f}", flush=True)
            tried.append({"method": name, **setting, "accuracy": accuracy, "top": score})
        mine = [t for t in tried if t["method"] == name]
        fine = [t for t in mine if t["accuracy"] >= least]
        # Where nothing qualifies, the most accurate is reported for what it is.
        best = max(fine, key=lambda t: t["top"]) if fine else max(mine, key=lambda t: t["accuracy"])
        chosen[name] = {k: v for k, v in best.items() if k not in ("method", "accuracy", "top")}
    return radius, chosen, tried


def train(study: Study, name: str, seed: int, setting: dict[str, Any]) -> nn.Module:
    """Train one method."""
    method = "softplus" if name.startswith("softplus") else name
    model: nn.Module = getattr(study, method)(seed, **setting)
    return model


def evaluate(study: Study, model: nn.Module, radius: float, options: Any) -> dict[str, float]:
    """Test figures of one network."""
    n, steps = (30, 10) if options.quick else (100, 50)
    report = study.report(model, "test", radius, n, steps)
    attack, noise = (report.row(attack=name).scores for name in ("attack", "noise"))
    x, y = (t[:500] for t in study.data["test"])
    with torch.no_grad():
        adversarial = _pgd(model).perturb(x, PGD_RADIUS, PGD_RADIUS / 5, 20, y)
        robust = float((model(adversarial).argmax(1) == y).float().mean())
    maps = Saliency(model).attribute(x.clone().requires_grad_(), target=y)
    ink = (x > 0.2).float()
    return {
        "accuracy": study.accuracy(model, "test"),
        "PGD accuracy": robust,
        "top-50, noise": noise[f"top-{TOP}"].mean,
        "top-50, attack": attack[f"top-{TOP}"].mean,
        "attack - noise": attack[f"top-{TOP} - control"].mean,
        "rank corr., attack": attack["spearman"].mean,
        "sparsity (Gini)": float(gini(maps).mean()),
        "mass on ink": float(((maps * ink).sum((1, 2, 3)) / maps.sum((1, 2, 3))).mean()),
    }


def draw(results: dict[str, Any], output: Any) -> None:
    """Draw top-50 intersections under noise and attack."""
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    names = list(results)
    for offset, column in ((-0.2, "top-50, noise"), (0.2, "top-50, attack")):
        means = [results[name][column]["mean"] for name in names]
        spread = [results[name][column]["spread"] for name in names]
        places = [i + offset for i in range(len(names))]
        axes.bar(places, means, 0.4, yerr=spread, label=column.partition(", ")[2])
    axes.set_xticks(range(len(names)), names, rotation=15)
    axes.set_ylabel("top-50 intersection with the clean map")
    axes.legend()
    save_plot(output, "stability_study", figure)


def draw_maps(model: nn.Module, x: Tensor, radius: float, steps: int) -> Figure:
    """Draw images and their maps, clean, under noise and under attack."""
    explainer = Saliency(model)
    target = model(x).argmax(1)
    found = {
        name: a.perturb(x, target=target) for name, a in attacks(explainer, radius, steps).items()
    }
    figure = Figure(figsize=(6, 1.2 * len(x)), layout="constrained")
    for row, (images, axes) in enumerate(
        zip(zip(x, *found.values(), strict=True), figure.subplots(len(x), 6), strict=True)
    ):
        batch = torch.stack(images).requires_grad_()
        maps = explainer.attribute(batch, target=int(target[row])).detach()
        for i, name in enumerate(("clean", *found)):
            axes[i].imshow(images[i][0], cmap="gray", vmin=0, vmax=1)
            axes[3 + i].imshow(maps[i, 0], cmap="magma", vmin=0, vmax=float(maps.max()))
            for axis, what in ((axes[i], "image"), (axes[3 + i], "map")):
                axis.set_axis_off()
                if row == 0:
                    axis.set_title(f"{what}, {name}", fontsize=9)
    return figure


def main() -> None:
    """Choose, train, attack, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", required=True, help="mnist=DIR")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=4)
    options = arguments.parse_args()
    study = Study(options.data, 1 if options.quick else options.epochs)
    radius, chosen, tried = choose(study, options)
    figures: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for name in ("standard", *chosen):
            setting = chosen.get(name, {})
            model = study.timed(name, functools.partial(train, study, name, seed, setting))
            figures.setdefault(name, []).append(evaluate(study, model, radius, options))
            if seed == 0 and name in ("standard", "softplus + hessian"):
                maps = draw_maps(model, study.data["test"][0][:2], radius, 50)
                save_plot(options.output, f"stability_maps_{name.partition(' ')[0]}", maps)
    results = {
        name: {
            column: {
                "mean": statistics.mean(run[column] for run in runs),
                "spread": statistics.pstdev([run[column] for run in runs]),
            }
            for column in runs[0]
        }
        for name, runs in figures.items()
    }
    columns = list(next(iter(results.values())))
    rows = [
        [name, *(f"{r[c]['mean']:.3f} ± {r[c]['spread']:.3f}" for c in columns)]
        for name, r in results.items()
    ]
    show(f"MNIST, radius {radius}, {options.seeds} seeds", ["method", *columns], rows)
    settings_used = {**vars(options), "radius": radius, "beta": BETA, "chosen": chosen}
    document = {"results": results, "tried": tried, "seconds": study.seconds}
    save(options.output, "stability_study", settings_used, document)
    draw(results, options.output)


if __name__ == "__main__":
    main()
