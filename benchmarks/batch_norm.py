"""What is left of a BatchNorm network in evaluation mode, when a prior explained it in training.

Decoy images: a patch in a corner tells the label in training and lies in the test set. Networks
with 2, 5 and 17 BatchNorm layers are trained with five priors, which explain three functions: the
network on the statistics of the explained batch, held (the default), on its running statistics
(``batch_norm="running"``), or in training mode on whatever rows go through, as published loops do.
Measured: accuracy of ``model.eval()``, and of the same weights with statistics computed anew
(``torch.optim.swa_utils.update_bn``), on training images and on those whose patch lies. Whoever is
ruined has much of the second and little of the first. Seeds are paired: data, initial weights and
batches are the same for all.

    python benchmarks/batch_norm.py [--data mnist=DIR] [--core | --quick]

``--core``: digits, Adam, 2 and 5 layers, three priors. The whole grid takes hours; it begins with
the core, and no setting is begun after ``--minutes`` of processor time. What there is, is kept.
"""

import copy
import dataclasses
import functools
import itertools
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from _batch_norm import PRIORS, TEST, TRAIN, Data, Network, load
from _common import save, save_plot, show
from _reproduction import accuracy, arguments_of, in_processes, seeds_of, summary
from matplotlib.figure import Figure
from torch import Tensor

BATCH, STEPS, POINT = 50, 96, 0.01
CHUNK = 60  # settings after which the figures so far are written
CORE = ("RRR", "InputXGradient + l1", "PixelPrior")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": functools.partial(torch.optim.Adam, lr=2e-3),
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}
Way = Literal["none", "batch", "running", "loop"]
WAYS: tuple[Way, ...] = ("batch", "running", "loop")
PARTS = ("train", "test")
Figures = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What is trained, with which prior; without one the weight is 0."""

    data: str
    layers: int
    optimizer: str
    prior: str = ""
    weight: float = 0.0

    @property
    def network(self) -> "Setting":
        """The same without a prior."""
        return Setting(self.data, self.layers, self.optimizer)

    @property
    def in_core(self) -> bool:
        """Whether it belongs to the core slice."""
        small = self.data == "digits" and self.layers < 17 and self.optimizer == "Adam"
        return small and self.prior in ("", *CORE)

    def __str__(self) -> str:
        prior = f"{self.prior}, {self.weight:g}" if self.prior else "no prior"
        return f"{self.data}, {self.layers} layers, {self.optimizer}, {prior}"


Job = tuple[Setting, int]  # with the seed
Found = dict[Job, dict[Way, Figures]]


def step_of(model: Network, data: Data, way: Way, setting: Setting) -> Callable[[Tensor], Tensor]:
    """Return the loss of some rows."""
    compared, weight = PRIORS.get(setting.prior), setting.weight
    explained = way in ("batch", "running")
    prior = compared.make(model, batch_norm=way) if compared and explained else None

    def loss(rows: Tensor) -> Tensor:
        x, y, allowed = data.x[rows], data.y[rows], data.allowed[rows]
        if compared and way == "loop":
            logits, scores = compared.loop(model, x.requires_grad_(), y, allowed, data)
            return F.cross_entropy(logits, y) + weight * scores.mean()
        plain = F.cross_entropy(model(x), y)
        if prior is None:
            return plain
        given = {"baselines": data.x, "annotation": allowed}
        given = {name: value for name, value in given.items() if prior.takes(name)}
        value: Tensor = prior(x, target=y, **given)
        return plain + weight * value

    return loss


def train(data: Data, way: Way, setting: Setting, seed: int, steps: int) -> Network:
    """Train; the batches of a seed are the same whatever a prior draws."""
    torch.manual_seed(seed)
    model = Network(setting.layers)
    loss = step_of(model, data, way, setting)
    optimizer = OPTIMIZERS[setting.optimizer](model.parameters())
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // len(data.x))
    batches = [torch.randperm(len(data.x), generator=generator).split(BATCH) for _ in range(epochs)]
    for rows in list(itertools.chain(*batches))[:steps]:
        optimizer.zero_grad(set_to_none=True)
        loss(rows).backward()
        optimizer.step()
    return model


def evaluate(model: Network, data: Data) -> Figures:
    """Accuracies in evaluation mode, as trained and with statistics of the training images."""
    anew = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(data.x.split(BATCH), anew)
    return {
        part + kind: accuracy(each.eval(), x, y)
        for kind, each in (("", model), (", recomputed", anew))
        for part, x, y in (("train", data.x, data.y), ("test", data.test_x, data.test_y))
    }


def run(job: Job, source: str, steps: int, until: float) -> dict[Way, Figures] | None:
    """Train one setting in each way; nothing once the processor's time is up."""
    if time.process_time() > until:
        return None
    setting, seed = job
    data = load(setting.data, source, seed)
    ways: tuple[Way, ...] = WAYS if setting.prior else ("none",)
    found = {}
    for way in ways:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = train(data, way, setting, seed, steps)
        found[way] = evaluate(model, data)
        if way == "running":
            found[way]["warned"] = float(
                any("batch_norm='running'" in str(w.message) for w in told)
            )
    return found


def grid(data: tuple[str, ...], seeds: range, *, core: bool) -> list[Job]:
    """Return the core slice, then the rest, seed after seed, in an order that favours nothing."""
    networks = [Setting(*each) for each in itertools.product(data, (2, 5, 17), OPTIMIZERS)]
    with_priors = [
        dataclasses.replace(network, prior=name, weight=weight)
        for network in networks
        for name, compared in PRIORS.items()
        for weight in compared.weights
    ]
    random.Random(0).shuffle(with_priors)
    settings = [*networks, *with_priors]  # what the others are measured by comes first
    first = [(s, seed) for s in settings if s.in_core for seed in seeds]
    rest = [(s, seed) for seed in seeds for s in settings if not s.in_core]
    return first if core else [*first, *rest]


def gaps(found: Found, jobs: list[Job], way: Way) -> Figures:
    """Accuracy in evaluation mode less that with statistics computed anew, mean of the runs."""
    runs = [found[job][way] for job in jobs]
    differences = [{p: run[p] - run[f"{p}, recomputed"] for p in PARTS} for run in runs]
    return {part: round(each["mean"], 6) for part, each in summary(differences).items()}


def is_within(found: Found, jobs: list[Job], way: Way) -> bool:
    """Whether each gap is a point at most, or that of the network without a prior."""
    plain = gaps(found, [(setting.network, seed) for setting, seed in jobs], "none")
    return all(
        abs(gap) <= max(POINT, abs(plain[part])) for part, gap in gaps(found, jobs, way).items()
    )


def beside_loop(found: Found, jobs: list[Job], figure: str) -> dict[str, Any]:
    """Paired difference of the default and the published loop."""
    differences = [{"": found[j]["batch"][figure] - found[j]["loop"][figure]} for j in jobs]
    each = summary(differences)[""]
    return {name: np.round(figures, 6).tolist() for name, figures in each.items()}


def judge(found: Found, jobs: list[Job]) -> dict[str, Any]:
    """What is claimed, and where it does not hold."""
    by_setting: dict[Setting, list[Job]] = {}
    for job in jobs:
        by_setting.setdefault(job[0], []).append(job)
    beside = {s: beside_loop(found, each, "test") for s, each in by_setting.items()}
    below = [s for s, d in beside.items() if d["mean"] < 0]
    # By more than seeds explain; of a single one nothing can be said.
    clearly = [
        s for s in below if len(by_setting[s]) > 1 and beside[s]["mean"] < -2 * beside[s]["error"]
    ]
    return {
        "settings": len(by_setting),
        "runs": len(jobs),
        "runs within": {way: sum(is_within(found, [j], way) for j in jobs) for way in WAYS},
        "settings within": {
            way: sum(is_within(found, each, way) for each in by_setting.values()) for way in WAYS
        },
        "largest gap": {
            way: max(abs(g) for job in jobs for g in gaps(found, [job], way).values())
            for way in WAYS
        },
        "warned": sum(found[job]["running"]["warned"] for job in jobs),
        "test, batch less loop": beside_loop(found, jobs, "test"),
        "the same, recomputed": beside_loop(found, jobs, "test, recomputed"),
        "settings below the loop": len(below),
        "by more than two standard errors": len(clearly),
        "missed": {
            "within": [
                {"run": f"{job[0]}, seed {job[1]}", **gaps(found, [job], "batch")}
                for job in jobs
                if not is_within(found, [job], "batch")
            ],
            "loop": {str(s): beside[s] for s in sorted(below, key=lambda s: beside[s]["mean"])},
        },
    }


def by_prior(found: Found, chosen: Callable[[Setting], bool]) -> dict[str, Any]:
    """Judge each prior over the settings that are chosen."""
    jobs = [job for job in found if job[0].prior and chosen(job[0])]
    each = {name: [job for job in jobs if job[0].prior == name] for name in PRIORS}
    return {name: judge(found, of_prior) for name, of_prior in each.items() if of_prior}


def results_of(found: Found, n_jobs: int) -> dict[str, Any]:
    """Figures of every setting over its seeds, what they say, and what was left out."""
    runs: dict[Setting, list[dict[Way, Figures]]] = {}
    for (setting, _), each in found.items():
        runs.setdefault(setting, []).append(each)
    return {
        "run": {
            "settings and seeds": len(found),
            "of": n_jobs,
            "settings by number of seeds": {
                str(n): sum(len(each) == n for each in runs.values())
                for n in sorted({len(each) for each in runs.values()})
            },
        },
        "core": by_prior(found, lambda setting: setting.in_core),
        "beyond the core": by_prior(found, lambda setting: not setting.in_core),
        "found": {
            str(setting): {way: flat([run[way] for run in each]) for way in each[0]}
            for setting, each in runs.items()
        },
    }


def flat(runs: list[Figures]) -> dict[str, Any]:
    """Mean of each figure and, where there are several runs, its deviation and all values."""
    found: dict[str, Any] = {}
    for name, each in summary(runs).items():
        found[name] = round(each["mean"], 4)
        if len(runs) > 1:
            found[f"{name}, stdev"] = round(each["stdev"], 4)
            found[f"{name}, values"] = [round(value, 4) for value in each["values"]]
    return found


def show_judged(title: str, judged: dict[str, Any]) -> None:
    """Print what the runs of each prior say."""
    columns = [
        *(f"within, {way}" for way in WAYS),
        "test, batch less loop",
        "settings below",
        "clearly",
    ]
    rows = []
    for name, row in judged.items():
        within = [f"{row['runs within'][way]} of {row['runs']}" for way in WAYS]
        beside = row["test, batch less loop"]
        rows.append(
            [
                name,
                *within,
                f"{beside['mean']:+.4f} ± {beside['error']:.4f}",
                f"{row['settings below the loop']} of {row['settings']}",
                row["by more than two standard errors"],
            ]
        )
    show(title, ["", *columns], rows)


def draw(found: dict[str, Any]) -> Figure:
    """Accuracies in evaluation mode against the weight: digits, Adam."""
    curves: dict[tuple[int, str], dict[float, Any]] = {}
    for layers, (name, compared) in itertools.product((2, 5, 17), PRIORS.items()):
        settings = [Setting("digits", layers, "Adam", name, w) for w in compared.weights]
        points = {s.weight: found[str(s)] for s in settings if str(s) in found}
        if len(points) > 1:
            curves[layers, name] = points
    rows, columns = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    figure = Figure(figsize=(3.2 * len(columns), 2.6 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
    for (layers, name), points in curves.items():
        axes = all_axes[rows.index(layers)][columns.index(name)]
        for colour, way in zip(("C0", "C3", "C2"), WAYS, strict=True):
            for line, part in (("--", "train"), ("-", "test")):
                axes.errorbar(
                    [*points],
                    [f[way][part] for f in points.values()],
                    [f[way].get(f"{part}, stdev", 0.0) for f in points.values()],
                    color=colour,
                    linestyle=line,
                    label=f"{way}, {part}",
                )
        plain = found[str(Setting("digits", layers, "Adam"))]["none"]["test"]
        axes.axhline(plain, color="k", linestyle=":", label="no prior, test")
        axes.set(xscale="log", title=f"{name}, {layers} layers", xlabel="weight")
    for each in all_axes[:, 0]:
        each.set_ylabel("accuracy, evaluation mode")
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    """Train the grid, or its core, and say where the claims do not hold."""
    arguments = arguments_of(__doc__)
    arguments.add_argument("--data", default=None, help="mnist=DIR with the t10k-* IDX files")
    arguments.add_argument("--core", action="store_true", help="only the core slice")
    arguments.add_argument("--minutes", type=float, help="of processor time, then stop")
    options = arguments.parse_args()
    core = options.core or options.quick
    seeds = seeds_of(options, full=3, quick=1)
    steps = STEPS // 8 if options.quick else STEPS
    data = ("digits",) if core or not options.data else ("digits", "mnist")
    jobs = grid(data, seeds, core=core)
    used = {k: v for k, v in vars(options).items() if v is not None}
    used |= {"seeds": len(seeds), "steps": steps, "batch": BATCH, "train": TRAIN, "test": TEST}
    until = float("inf") if options.minutes is None else 60 * options.minutes
    job = functools.partial(run, source=options.data or "", steps=steps, until=until)
    found: Found = {}
    for some in (jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)):
        each = zip(some, in_processes(job, some, options.jobs), strict=True)
        found |= {one: ways for one, ways in each if ways is not None}
        results = results_of(found, len(jobs))
        save(options.output, "batch_norm", used, results)
    for part in ("core", "beyond the core"):
        if results[part]:
            show_judged(f"BatchNorm in training mode, {part}", results[part])
    save_plot(options.output, "batch_norm", draw(results["found"]))


if __name__ == "__main__":
    main()
