"""``HessianPenalty`` beside curvlinops, which estimates the same number with the same vectors.

The inputs of a batch as the parameter of a model, whose outputs for the labels are summed:
``curvlinops.HessianLinearOperator`` then is the matrix of the examples' Hessians along its
diagonal, and ``hutchinson_squared_fro`` over the batch is the penalty's value. An MLP and a
convolutional network with Softplus, and a sum of functions of one feature each, whose Hessian is
diagonal: there both have no variance. Compared are values (means over many draws beside the exact
one, from the operator's columns) and time at equal vectors, runs taking turns, of the processor.
What training needs, the gradient with respect to the parameters, curvlinops does not have: its
products are taken without a graph. Skipped where curvlinops is not installed (``pip install
--no-deps curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt_einsum``;
with its dependencies comes a torchvision that may not suit the torch that is there).
"""

import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import in_turns, parser, ratio, save, show
from _networks import CLASSES, cnn, mlp
from torch import Tensor, nn

from captum_priors.stability import HessianPenalty, smooth_activations

try:
    import curvlinops
except ImportError:
    curvlinops = None

BATCH, COUNTS = 16, (1, 8, 32)
CURVATURES: Any = ("exact", "difference")


class Additive(nn.Module):
    """Sums of one function of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(CLASSES, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums."""
        return torch.tanh(x.unsqueeze(1) * self.scale).sum(2)


NETWORKS: dict[str, tuple[Callable[..., Any], Callable[[nn.Module], nn.Module]]] = {
    "additive": (mlp, lambda _: Additive()),
    "MLP": (mlp, lambda model: smooth_activations(model, 5.0)),
    "CNN": (cnn, lambda model: smooth_activations(model, 5.0)),
}


class OfInputs(nn.Module):
    """A model's outputs for the labels, a function of its parameter: the inputs."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.y = model, nn.Parameter(x.clone()), y

    def forward(self, _: Tensor) -> Tensor:
        """Return them."""
        outputs: Tensor = self.model(self.x)
        return outputs.gather(1, self.y.unsqueeze(1))


class Total(nn.Module):
    """The sum, as a loss that is summed over the batch."""

    reduction = "sum"

    def forward(self, outputs: Tensor, _: Tensor) -> Tensor:
        """Return it."""
        return outputs.sum()


def operator_of(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """Hessians of the examples along the diagonal."""
    function = OfInputs(model, x, y)
    return curvlinops.HessianLinearOperator(
        function, Total(), [function.x], [(x, y)], check_deterministic=False
    )


def exact(operator: Any, x: Tensor) -> float:
    """Mean over the examples of the squared norm, from one column of all at a time."""
    columns = torch.eye(x[0].numel(), dtype=x.dtype).repeat(len(x), 1)
    return sum(float((operator @ some).square().sum()) for some in columns.split(32, 1)) / len(x)


def values(model: nn.Module, x: Tensor, y: Tensor, draws: int) -> dict[str, Any]:
    """Means over draws of one vector each, by either, and how many errors they are off."""
    operator = operator_of(model, x, y)
    penalty, truth = HessianPenalty(model), exact(operator, x)
    estimates: dict[str, Callable[[], Tensor]] = {
        "HessianPenalty": lambda: penalty(x, target=y),
        "curvlinops": lambda: curvlinops.hutchinson_squared_fro(operator, 1) / len(x),
    }
    found: dict[str, Any] = {"exact": truth}
    for name, estimate in estimates.items():
        each = [estimate().item() for _ in range(draws)]
        mean, error = statistics.mean(each), statistics.stdev(each) / math.sqrt(draws)
        found[name] = {
            "mean": mean,
            "error": error,
            "relative difference": (mean - truth) / truth,
            "values": each,
        }
    return found


def times(model: nn.Module, x: Tensor, y: Tensor, n: int, budget: float) -> dict[str, Any]:
    """Ratios of the time at ``n`` vectors."""
    operator, parameters = operator_of(model, x, y), [*model.parameters()]

    def theirs() -> Tensor:
        value: Tensor = curvlinops.hutchinson_squared_fro(operator, n) / len(x)
        return value

    runs: dict[str, Callable[[], object]] = {"curvlinops": theirs}
    for curvature in CURVATURES:
        penalty = HessianPenalty(model, n, curvature=curvature)
        value = torch.no_grad()(lambda penalty=penalty: penalty(x, target=y))
        runs[curvature] = value
        runs[f"{curvature}, with gradient"] = lambda penalty=penalty: torch.autograd.grad(
            penalty(x, target=y), parameters, allow_unused=True
        )
    start = time.process_time()
    for run in runs.values():
        run()
    rounds = min(100, max(5, int(budget / (time.process_time() - start))))
    seconds, again = in_turns(runs, rounds, time.process_time, "curvlinops")
    return {
        "milliseconds": {name: 1e3 * statistics.median(each) for name, each in seconds.items()},
        "over curvlinops": {
            name: ratio(each, seconds["curvlinops"])
            for name, each in seconds.items()
            if name != "curvlinops"
        },
        "curvlinops has a graph": theirs().requires_grad,
        "A/A": again,
    }


def main() -> None:
    """Run and report."""
    options = parser(__doc__).parse_args()
    if curvlinops is None:
        print("hessian_penalty: skipped, curvlinops is not installed.")
        return
    draws, budget = (20, 1.0) if options.quick else (100, 8.0)
    results: dict[str, Any] = {}
    for name, (make, prepared) in NETWORKS.items():
        torch.manual_seed(0)
        network = make(BATCH)
        model = prepared(network.make())
        results[name] = {
            "times": {n: times(model, network.x, network.y, n, budget) for n in COUNTS},
            "values": values(model.double(), network.x.double(), network.y, draws),
        }
    rows = [
        [
            name,
            f"{v['exact']:.6g}",
            *(f"{v[k]['mean']:.6g} ± {v[k]['error']:.2g}" for k in [*v][1:]),
        ]
        for name, v in ((name, found["values"]) for name, found in results.items())
    ]
    show(f"Mean of {draws} draws ± its error", ["", "exact", "ours", "curvlinops"], rows)
    rows = [
        [f"{name}, {n}", *found["over curvlinops"].values(), found["A/A"]["curvlinops"]]
        for name, each in results.items()
        for n, found in each["times"].items()
    ]
    columns = [*results["MLP"]["times"][1]["over curvlinops"], "A/A"]
    show("Time over that of curvlinops' value, by vectors", ["", *columns], rows)
    used = {"curvlinops": importlib.metadata.version("curvlinops-for-pytorch"), "draws": draws}
    save(options.output, "hessian_penalty", vars(options) | used | {"batch": BATCH}, results)


if __name__ == "__main__":
    main()
