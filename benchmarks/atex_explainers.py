"""ATEX with each explainer as its direction: which helps which map? (Tang et al. 2022).

The paper's claim is for any explanation. A network of convolutions, max-pooling and tanh learns
scikit-learn's digits (8 × 8); students start from it and are trained by distillation alone (radius
.32, temperature 4, 8 draws), in the direction of one explainer each. The maps of every explainer
are then compared at test images and at points moved from them: by noise, and by an attack on the
gradient's largest pixels, of one radius. The controls are the teacher itself, and a student that is
distilled at the images alone.

    python benchmarks/atex_explainers.py
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import save, save_plot
from _reproduction import (
    accuracy,
    arguments_of,
    gains,
    in_processes,
    seeds_of,
    show_runs,
    summary,
)
from captum.attr import IntegratedGradients, KernelShap, LayerAttribution, LayerGradCam, Saliency
from matplotlib.figure import Figure
from ranked_gradients import digits
from torch import Tensor, nn

from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.metrics import top_k_intersection
from captum_priors.stability import ATEX

RADII, TOP, EPOCHS, STEPS, BATCH = (0.05, 0.1), 16, 30, 400, 16
ATEX_RADIUS = 0.32
# Features of KernelSHAP: blocks of 2 × 2 pixels.
BLOCKS = torch.arange(16).reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)[None, None]


class SmoothGrad:
    """Mean gradient over ten noisy copies, as ATEX's default."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Average the gradients of the target output."""
        copies = inputs.repeat(10, 1, 1, 1)
        copies = copies + ATEX_RADIUS / 4 * torch.randn_like(copies)
        maps: Tensor = Saliency(self.model).attribute(copies, target.repeat(10), abs=False)
        return maps.unflatten(0, (10, -1)).mean(0)


class GradCAM:
    """Grad-CAM of the second convolution, as large as the image."""

    def __init__(self, model: nn.Sequential) -> None:
        self.explainer = LayerGradCam(model, model[3])

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Enlarge the layer's map."""
        return LayerAttribution.interpolate(
            self.explainer.attribute(inputs, target).detach(), inputs.shape[2:], "bilinear"
        )


class Blocks:
    """KernelSHAP of 16 blocks of pixels."""

    def __init__(self, model: nn.Module, n_samples: int) -> None:
        self.explainer, self.n_samples = KernelShap(model), n_samples

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Sample coalitions of blocks."""
        options: dict[str, Any] = {"feature_mask": BLOCKS, "perturbations_per_eval": 64}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Captum's advice about speed
            found: Tensor = self.explainer.attribute(
                inputs, target=target, n_samples=self.n_samples, **options
            )
        return found


EXPLAINERS: dict[str, Callable[[nn.Sequential], tuple[Any, dict[str, Any]]]] = {
    "gradient": lambda model: (Saliency(model), {"abs": False}),
    "SmoothGrad": lambda model: (SmoothGrad(model), {}),
    "integrated gradients": lambda model: (IntegratedGradients(model), {"n_steps": 10}),
    "Grad-CAM": lambda model: (GradCAM(model), {}),
    "KernelSHAP": lambda model: (Blocks(model, 32), {}),
}


def network() -> nn.Sequential:
    """Convolutions, max-pooling and tanh, as in the paper's."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(32 * 16, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def teacher_of(seed: int, x: Tensor, y: Tensor, epochs: int) -> nn.Sequential:
    """Train with cross entropy alone."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model


def student_of(
    teacher: nn.Sequential, direction: str, seed: int, x: Tensor, y: Tensor, steps: int
) -> nn.Sequential:
    """Train a copy of the teacher with ATEX alone."""
    student = network()
    student.load_state_dict(teacher.state_dict())
    torch.manual_seed(1000 + seed)
    if direction == "distilled":
        prior = ATEX(student, Saliency(student), radius=1e-6, positions=(0,), abs=False)
    else:
        explainer, options = EXPLAINERS[direction](student)
        prior = ATEX(student, explainer, radius=ATEX_RADIUS, **options)
    optimizer = torch.optim.Adam(student.parameters(), 1.5e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad(set_to_none=True)
        prior(x[rows], target=y[rows]).backward()
        optimizer.step()
    return student


def maps_of(model: nn.Sequential, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Maps of one explainer; what it draws is the same at every call."""
    torch.manual_seed(0)
    explainer, options = EXPLAINERS[name](model)
    if isinstance(explainer, Blocks):
        explainer.n_samples = 200
    found: Tensor = explainer.attribute(x, target=y, **options).detach()
    return found


def figures(model: nn.Sequential, data: tuple[Tensor, Tensor], n: int) -> dict[str, float]:
    """Accuracy, and for each map the share of its largest pixels that stays."""
    x, y = data[0][:n], data[1][:n]
    clean = {name: maps_of(model, name, x, y) for name in EXPLAINERS}
    found = {"accuracy": accuracy(model, *data)}
    for radius in RADII:
        ball: dict[str, Any] = {"radius": radius, "lower_bound": 0.0, "upper_bound": 1.0, "seed": 0}
        gradient = Saliency(model)
        attacks = {
            "noise": RandomAttack(gradient, **ball),
            "attack": TopKAttack(gradient, TOP, step_num=20, **ball),
        }
        for kind, attack in attacks.items():
            moved = attack.perturb(x, target=y)
            for name, before in clean.items():
                after = maps_of(model, name, moved, y)
                same = top_k_intersection(before, after, k=TOP)
                found[f"{name}, {kind} {radius:g}"] = float(same.mean())
    return found


def run_seed(seed: int, epochs: int, steps: int, n: int) -> dict[str, dict[str, float]]:
    """Teacher and every student of one seed."""
    data = {part: (x.reshape(-1, 1, 8, 8), y) for part, (x, y) in digits().items()}
    fit, test = data["train"], data["test"]
    teacher = teacher_of(seed, *fit, epochs)
    found = {"teacher": figures(teacher, test, n)}
    for direction in ("distilled", *EXPLAINERS):
        student = student_of(teacher, direction, seed, *fit, steps)
        found[direction] = figures(student, test, n)
    return found


def main() -> None:
    """Run the seeds; a row for each direction, a column for each map."""
    options = arguments_of(__doc__).parse_args()
    seeds = seeds_of(options, full=3, quick=1)
    epochs, steps, n = (2, 3, 10) if options.quick else (EPOCHS, STEPS, 60)
    job = functools.partial(run_seed, epochs=epochs, steps=steps, n=n)
    each = in_processes(job, seeds, options.jobs)
    runs = {direction: [run[direction] for run in each] for direction in each[0]}
    shown = ["accuracy", *(f"{name}, attack {RADII[0]:g}" for name in EXPLAINERS)]
    show_runs("digits", {d: [{k: run[k] for k in shown} for run in r] for d, r in runs.items()})
    results = {
        "found": {direction: summary(r) for direction, r in runs.items()},
        "gain over the teacher": {
            direction: gains(r, runs["teacher"])
            for direction, r in runs.items()
            if direction != "teacher"
        },
    }
    save(options.output, "atex_explainers", vars(options), results)
    save_plot(options.output, "atex_explainers", draw(results["gain over the teacher"]))


def draw(gained: dict[str, Any]) -> Figure:
    """Mean gain over the teacher: directions × maps, for noise and attack at the smaller radius."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("noise", "attack"), strict=True):
        table = [
            [row[f"{name}, {kind} {RADII[0]:g}"]["mean"] for name in EXPLAINERS]
            for row in gained.values()
        ]
        axes.imshow(table, cmap="RdBu", vmin=-0.3, vmax=0.3)
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:+.2f}", ha="center", va="center")
        axes.set_xticks(range(len(EXPLAINERS)), list(EXPLAINERS), rotation=30, ha="right")
        axes.set_yticks(range(len(gained)), list(gained))
        axes.set_xlabel("map")
        axes.set_ylabel("direction of ATEX")
        axes.set_title(f"top-{TOP} intersection less the teacher's, {kind} {RADII[0]:g}")
    return figure


if __name__ == "__main__":
    main()
