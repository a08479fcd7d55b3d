"""A prior on a stock transformer, whose fused attention has no second derivative.

How far the parameter gradients are from the exact one (double backpropagation with the model put
under the math kernel by hand), in float32: of ``double_backprop``, which goes from the fused kernel
to that one by itself, and of ``finite_difference``, which stays on the fused one; and what training
with the prior does to loss, accuracy and penalty.

The task: in a sequence of 16 tokens, tell which of four patterns was added at a random position.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import interleaved, parser, save, save_plot, show
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_priors import AttributionPrior, ExpectedGradients
from captum_priors.penalties import l1, total_variation

LENGTH, FEATURES, CLASSES, BATCH = 16, 8, 4, 32
N_SAMPLES = 4


class Classifier(nn.Module):
    """A linear embedding with learned positions, a stock encoder, mean pooling, a linear head."""

    def __init__(self, activation: str, width: int = 48, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, width)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation=activation, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.encoder(self.embed(x) + self.position).mean(1))
        return logits


class Task:
    """Draws batches of sequences."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.patterns = 2 * torch.randn(CLASSES, 3, FEATURES, generator=self.generator)

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Noise with a pattern of three tokens somewhere in each sequence."""
        x = torch.randn(n, LENGTH, FEATURES, generator=self.generator)
        y = torch.randint(CLASSES, (n,), generator=self.generator)
        start = torch.randint(LENGTH - 2, (n,), generator=self.generator)
        for i in range(3):
            x[torch.arange(n), start + i] += self.patterns[y, i]
        return x, y


def total_variation_in_time(attributions: Tensor) -> Tensor:
    """Smoothness of the tokens' importance; without signs, which features may share."""
    return total_variation(attributions.abs().sum(2))


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": l1,
    "total variation": total_variation_in_time,
}


def prior_of(model: nn.Module, way: Any, penalty: Any, background: Tensor) -> AttributionPrior:
    """Make the prior; its stream starts from the same seed each time."""
    torch.manual_seed(7)
    explainer = ExpectedGradients(model, differentiation=way)
    return AttributionPrior(explainer, penalty, n_samples=N_SAMPLES, baselines=background)


def parameter_gradient(model: nn.Module, prior: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the prior, as one vector."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(prior(x, target=y), parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def trained(activation: str, weight: float, steps: int, seed: int) -> dict[str, Any]:
    """Train, with the prior at this weight; return the model and the course of training."""
    torch.manual_seed(seed)
    model, task = Classifier(activation), Task(seed)
    background = task.batch(128)[0]
    prior = prior_of(model, "finite_difference", total_variation_in_time, background)
    test_x, test_y = task.batch(512)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    course: dict[str, list[float]] = {"step": [], "loss": [], "accuracy": [], "penalty": []}
    for step in range(steps + 1):
        if step % 50 == 0:
            with torch.no_grad():
                logits = model(test_x)
                course["step"].append(step)
                course["loss"].append(F.cross_entropy(logits, test_y).item())
                course["accuracy"].append((logits.argmax(1) == test_y).float().mean().item())
                course["penalty"].append(prior(test_x, target=test_y).item())
        x, y = task.batch(BATCH)
        loss = F.cross_entropy(model(x), y)
        if weight:
            loss = loss + weight * prior(x, target=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"model": model, "task": task, "background": background, "course": course}


def gradient_error(run: dict[str, Any], penalty: Any, way: str) -> float:
    """Error of a way on the model as it is, relative to the exact gradient."""
    model, background = run["model"], run["background"]
    x, y = run["task"].batch(BATCH)
    # Two priors at a time would draw differently.
    with sdpa_kernel(SDPBackend.MATH):
        start = prior_of(model, "double_backprop", penalty, background)
        exact = parameter_gradient(model, start, x, y)
        del start
    found = parameter_gradient(model, prior_of(model, way, penalty, background), x, y)
    return float((found - exact).norm() / exact.norm())


def relative_times(run: dict[str, Any], rounds: int) -> dict[str, float]:
    """Time of the prior's gradient over that of the plain loss."""
    model, background = run["model"], run["background"]
    x, y = run["task"].batch(BATCH)
    difference = prior_of(model, "finite_difference", l1, background)
    double = prior_of(model, "double_backprop", l1, background)

    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: F.cross_entropy(model(x), y).backward(),
        "finite_difference, fused": lambda: parameter_gradient(model, difference, x, y),
        "double_backprop, math": lambda: parameter_gradient(model, double, x, y),
    }
    for each in runs.values():
        each()
    seconds = interleaved(runs, rounds)
    return {name: each / seconds["plain"] for name, each in seconds.items()}


def errors_of(
    activation: str, seeds: range, lengths: tuple[int, ...]
) -> dict[str, dict[int, list[float]]]:
    """Gradient errors of every seed, by penalty and by the number of training steps before."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in PENALTIES}
    for length in lengths:
        runs = [trained(activation, 0.0, length, seed) for seed in seeds]
        for name, penalty in PENALTIES.items():
            found[name][length] = [
                gradient_error(run, penalty, "finite_difference") for run in runs
            ]
    return found


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--weight", type=float, default=0.05)
    args = arguments.parse_args()
    seeds = range(2 if args.quick else 5)
    lengths = (0, 100) if args.quick else (0, 100, 300)
    steps = 100 if args.quick else 300
    fresh = trained("gelu", 0.0, 0, 0)
    results: dict[str, Any] = {
        "double_backprop": {
            name: gradient_error(fresh, penalty, "double_backprop")
            for name, penalty in PENALTIES.items()
        },
        "errors": {},
    }
    show(
        "double_backprop beside the math kernel, GELU",
        [*PENALTIES],
        [[*results["double_backprop"].values()]],
    )

    rows = []
    for activation in ("gelu", "relu"):
        found = results["errors"][activation] = errors_of(activation, seeds, lengths)
        for name, by_length in found.items():
            rows += [
                [activation, name, length, statistics.median(each), max(each)]
                for length, each in by_length.items()
            ]
    columns = ["activation", "penalty", "steps trained", "median", "largest"]
    show(f"Relative error of finite_difference, {len(seeds)} seeds", columns, rows)

    results["relative_time"] = times = relative_times(fresh, 3 if args.quick else 15)
    show("Time of a gradient over the plain loss", list(times), [list(times.values())])

    runs = {
        w: [trained("gelu", w, steps, seed)["course"] for seed in seeds] for w in (0.0, args.weight)
    }
    results["training"] = {str(w): each for w, each in runs.items()}
    measures = ("loss", "accuracy", "penalty")
    show(
        f"After {steps} steps, GELU, total variation in time, mean over seeds",
        ["weight", *measures],
        [
            [w, *(statistics.mean(c[m][-1] for c in each) for m in measures)]
            for w, each in runs.items()
        ],
    )
    figure = Figure(figsize=(12, 3.5))
    for axes, measure in zip(figure.subplots(1, 3), measures, strict=True):
        for w, each in runs.items():
            mean = [statistics.mean(v) for v in zip(*(c[measure] for c in each), strict=True)]
            axes.plot(each[0]["step"], mean, label=f"weight {w:g}" if w else "no prior")
        axes.set(xlabel="step", title=f"test {measure}")
        axes.legend()
    settings = {"quick": args.quick, "weight": args.weight, "samples": N_SAMPLES, "batch": BATCH}
    save(args.output, "fused_attention", settings, results)
    save_plot(args.output, "fused_attention", figure)


if __name__ == "__main__":
    main()
