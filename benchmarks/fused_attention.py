"""Priors on fused attention and on compiled models: how exact, and at what price.

A stock transformer, the same compiled, and a compiled convolutional network: how far the parameter
gradients of a prior are from those of the eager model with attention in plain matrix products; how
long a training step takes under ``double_backprop``, ``recompute`` and ``finite_difference``, whose
error along training is measured as well; and what training with the prior does to loss, accuracy
and penalty.

The task: in a sequence of 16 tokens, tell which of four patterns was added at a random position.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import in_turns, parser, ratio, save, save_plot, show
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_priors import AttributionPrior, ExpectedGradients
from captum_priors.penalties import l1, total_variation

LENGTH, FEATURES, CLASSES, BATCH = 16, 8, 4, 32
N_SAMPLES = 4


class Classifier(nn.Module):
    """A linear embedding with learned positions, a stock encoder, mean pooling, a linear head."""

    def __init__(self, width: int = 48, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, width)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True
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


def trained(weight: float, steps: int, seed: int) -> dict[str, Any]:
    """Train, with the prior at this weight; return the model and the course of training."""
    torch.manual_seed(seed)
    model, task = Classifier(), Task(seed)
    background = task.batch(128)[0]
    prior = prior_of(model, "double_backprop", total_variation_in_time, background)
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


def gradient_error(run: dict[str, Any], penalty: Any) -> float:
    """Error of ``finite_difference`` on the model as it is, relative to the exact gradient."""
    model, background = run["model"], run["background"]
    x, y = run["task"].batch(BATCH)
    return error(model, model, "finite_difference", penalty, background, x, y)


def error(
    model: nn.Module, run_as: Any, way: str, penalty: Any, background: Tensor, x: Tensor, y: Tensor
) -> float:
    """Error of a parameter gradient, relative to the eager model's in plain matrix products."""
    eager = copy.deepcopy(model)
    # Two priors at a time would draw differently.
    with sdpa_kernel(SDPBackend.MATH):
        start = prior_of(eager, "double_backprop", penalty, background)
        exact = parameter_gradient(eager, start, x, y)
        del start
    found = parameter_gradient(model, prior_of(run_as, way, penalty, background), x, y)
    return float((found - exact).norm() / exact.norm())


# ---- Models as they are trained --------------------------------------------------------------


def compiled_by(backend: str) -> Callable[[nn.Module], Any]:
    """Return what compiles a model."""
    return lambda model: torch.compile(model, backend=backend)


def convolutional() -> nn.Module:
    """Two convolutions with pooling, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, CLASSES)),
    )


def forms(backend: str) -> dict[str, tuple[Any, Any, Callable[[], tuple[Tensor, Tensor]]]]:
    """Return how each model is made, what it is trained as, and its batches."""

    def sequences() -> tuple[Tensor, Tensor]:
        return Task(0).batch(BATCH)

    def images() -> tuple[Tensor, Tensor]:
        return torch.randn(BATCH, 1, 16, 16), torch.randint(CLASSES, (BATCH,))

    return {
        "transformer, fused attention": (Classifier, lambda model: model, sequences),
        "transformer, compiled": (Classifier, compiled_by(backend), sequences),
        "convolutional network, compiled": (convolutional, compiled_by(backend), images),
    }


def exactness(backend: str) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of the exact ways, in both precisions."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (make, as_trained, batch) in forms(backend).items():
        found[name] = {}
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            model = make().to(dtype)
            x, y = batch()
            x = x.to(dtype)
            run_as = as_trained(model)
            F.cross_entropy(run_as(x), y).backward()  # it is compiled by now
            found[name][str(dtype).removeprefix("torch.")] = {
                way: error(model, run_as, way, l1, x.roll(1, 0), x, y)
                for way in ("double_backprop", "recompute")
            }
    return found


WAYS = ("double_backprop", "recompute", "finite_difference")


def step_times(backend: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Time of a training step with a prior of one sample, over that of one without."""
    found: dict[str, dict[str, Any]] = {}
    for name, (make, as_trained, batch) in forms(backend).items():
        torch.manual_seed(0)
        model = make()
        x, y = batch()
        run_as, optimizer = as_trained(model), torch.optim.Adam(model.parameters(), 1e-4)

        def step(
            prior: Any,
            run_as: Any = run_as,
            optimizer: Any = optimizer,
            x: Tensor = x,
            y: Tensor = y,
        ) -> None:
            loss = F.cross_entropy(run_as(x), y)
            if prior is not None:
                loss = loss + 1e-3 * prior(x, target=y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        runs: dict[str, Callable[[], None]] = {"plain": lambda step=step: step(None)}  # type: ignore[misc]  # a default
        for way in WAYS:
            explainer = ExpectedGradients(run_as, differentiation=way)  # type: ignore[arg-type]  # a word
            prior = AttributionPrior(explainer, l1, n_samples=1, baselines=x.roll(1, 0))
            runs[way] = lambda step=step, prior=prior: step(prior)  # type: ignore[misc]  # a default
        for each in (*runs.values(), *runs.values()):
            each()
        seconds, again = in_turns(runs, rounds, time.process_time, "plain")
        found[name] = {"plain, ms": 1000 * statistics.median(seconds["plain"])}
        found[name] |= {way: ratio(seconds[way], seconds["plain"]) for way in WAYS}
        found[name]["A/A"] = again
    return found


def errors_of(seeds: range, lengths: tuple[int, ...]) -> dict[str, dict[int, list[float]]]:
    """Gradient errors of every seed, by penalty and by the number of training steps before."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in PENALTIES}
    for length in lengths:
        runs = [trained(0.0, length, seed) for seed in seeds]
        for name, penalty in PENALTIES.items():
            found[name][length] = [gradient_error(run, penalty) for run in runs]
    return found


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--weight", type=float, default=0.05)
    arguments.add_argument("--backend", default="inductor", help="of torch.compile")
    args = arguments.parse_args()
    seeds = range(2 if args.quick else 5)
    lengths = (0, 100) if args.quick else (0, 100, 300)
    steps = 100 if args.quick else 300
    results: dict[str, Any] = {"exact": exactness(args.backend)}
    show(
        "Error of the parameter gradient beside the eager model in plain matrix products",
        ["model", "precision", *WAYS[:2]],
        [
            [name, precision, *each.values()]
            for name, by_precision in results["exact"].items()
            for precision, each in by_precision.items()
        ],
    )

    results["step"] = step_times(args.backend, 10 if args.quick else 40)
    show(
        f"A training step, one sample, {args.backend}: over the plain step",
        ["model", "plain, ms", *WAYS, "A/A"],
        [[name, *[*t.values()][:-1], t["A/A"]["plain"]] for name, t in results["step"].items()],
    )

    results["errors"] = {"gelu": errors_of(seeds, lengths)}
    show(
        f"Relative error of finite_difference, {len(seeds)} seeds",
        ["penalty", "steps trained", "median", "largest"],
        [
            [name, length, statistics.median(each), max(each)]
            for name, by_length in results["errors"]["gelu"].items()
            for length, each in by_length.items()
        ],
    )

    runs = {w: [trained(w, steps, seed)["course"] for seed in seeds] for w in (0.0, args.weight)}
    results["training"] = {str(w): each for w, each in runs.items()}
    measures = ("loss", "accuracy", "penalty")
    show(
        f"After {steps} steps, total variation in time, mean over seeds",
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
    settings |= {"backend": args.backend, "seeds": len(seeds)}
    save(args.output, "fused_attention", settings, results)
    save_plot(args.output, "fused_attention", figure)


if __name__ == "__main__":
    main()
