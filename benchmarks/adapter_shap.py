"""Cost of SHAP's explainers through their adapters, relative to the stock classes.

A batch of 16 rows, 20 features, 50 background rows and default samples (ExactExplainer: 10
features; CoalitionExplainer: 5 groups of 4). Two ratios: values with their graph, and both with the
backward pass to the parameters. Beside them the largest difference of the values under one seed,
and the error of the certificate on a small float64 case of the same explainer. Runs take turns;
medians.
"""

import io
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import shap
import torch
from _common import in_turns, parser, ratio, save, show
from rich.progress import track
from torch import Tensor, nn

from captum_priors import differentiable
from captum_priors.adapters.shap import ROWS
from captum_priors.testing import check_differentiable

N_ROWS, N_BACKGROUND = 16, 50
SECONDS = 20.0  # for the rounds of one explainer
MANY = 200  # rounds of one that takes milliseconds, whose times scatter
warnings.filterwarnings("ignore", category=FutureWarning)  # SHAP's own code


class Additive(nn.Module):
    """A generalised additive model."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(n)), nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        """Return one output for each row."""
        return torch.tanh(x * self.scale + self.shift).sum(1)


def network(name: str, n: int, hidden: int) -> nn.Module:
    """Return what the explainer of this name is for."""
    if name == "LinearExplainer":
        return nn.Linear(n, 1)
    if name == "AdditiveExplainer":
        return Additive(n)
    return nn.Sequential(
        nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
    )


def stock(name: str, model: nn.Module, background: np.ndarray, groups: int) -> Any:
    """Make SHAP's explainer of a model."""
    dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def predict(x: Any) -> np.ndarray:
        return model(torch.as_tensor(np.asarray(x), dtype=dtype)).numpy().reshape(len(x))

    @torch.no_grad()
    def two(x: Any) -> np.ndarray:  # SHAP's CoalitionExplainer fails on one output and NumPy 2.4
        return predict(x)[:, None].repeat(2, axis=1)

    cls = getattr(shap, name)
    if name in ("GradientExplainer", "DeepExplainer"):
        return cls(model, torch.as_tensor(background, dtype=dtype))
    if name == "LinearExplainer":
        return cls((model.weight.detach().numpy()[0], model.bias.detach().numpy()[0]), background)
    if name == "PartitionExplainer":
        return cls(predict, shap.maskers.Partition(background))
    if name == "CoalitionExplainer":
        masker = shap.maskers.Partition(background)
        masker.feature_names = [f"f{i}" for i in range(background.shape[1])]
        parts = np.array_split(np.array(masker.feature_names), groups)
        return cls(two, masker, partition_tree={f"g{i}": list(p) for i, p in enumerate(parts)})
    if name == "AdditiveExplainer":
        return cls(predict, shap.maskers.Independent(background))
    return cls(predict, background)


def adapted(name: str, explainer: Any, model: nn.Module) -> Any:
    """Make it differentiable."""
    if name in ("GradientExplainer", "DeepExplainer"):
        return differentiable(explainer)
    if name == "CoalitionExplainer":
        return differentiable(explainer, model=lambda x: model(x).expand(-1, 2))
    return differentiable(explainer, model=model)


def silent(run: Callable[[], Any]) -> Any:
    """Run without SHAP's progress bars."""
    with redirect_stderr(io.StringIO()):
        return run()


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Time one explainer, and compare its values."""
    torch.manual_seed(0)
    random = np.random.RandomState(0)
    n = 10 if name == "ExactExplainer" else 20
    background = random.standard_normal((N_BACKGROUND, n)).astype(np.float32)
    x = random.standard_normal((N_ROWS, n)).astype(np.float32)
    model = network(name, n, 32).eval()
    explainer = stock(name, model, background, 5)
    adapter = adapted(name, explainer, model)
    data: Any = torch.as_tensor(x) if name in ("GradientExplainer", "DeepExplainer") else x
    parameters = list(model.parameters())

    def with_backward() -> Any:
        return torch.autograd.grad(
            adapter(data).tensor.square().sum(), parameters, allow_unused=True
        )

    def values(of: Any) -> np.ndarray:
        np.random.seed(1)  # noqa: NPY002  # SHAP's generator
        return np.asarray(silent(lambda: of(data)).values, dtype=float)

    start = time.process_time()
    theirs = values(explainer)
    seconds_each = time.process_time() - start
    rounds = max(1, min(max(rounds, int(1 / seconds_each)), MANY, int(SECONDS / seconds_each)))
    ours = values(adapter)
    seconds, again = in_turns(
        {
            "stock": lambda: silent(lambda: explainer(data)),
            "with graph": lambda: silent(lambda: adapter(data)),
            "with backward": lambda: silent(with_backward),
        },
        rounds,
        time.process_time,
        "stock",
    )
    return {
        "stock_seconds": statistics.median(seconds["stock"]),
        "with graph": ratio(seconds["with graph"], seconds["stock"]),
        "with backward": ratio(seconds["with backward"], seconds["stock"]),
        "value_error": float(np.abs(theirs.reshape(ours.shape) - ours).max()),
        "certificate": certificate(name),
        "A/A": again,
    }


def certificate(name: str) -> float:
    """Certify the explainer on a small case in float64."""
    torch.manual_seed(0)
    random = np.random.RandomState(0)
    model = network(name, 4, 5).double().eval()
    explainer = stock(name, model, random.standard_normal((6, 4)), 2)
    found = check_differentiable(
        adapted(name, explainer, model),
        torch.as_tensor(random.standard_normal((2, 4))),
        target=1 if name == "CoalitionExplainer" else None,
        parameters=list(model.named_parameters()),
    )
    return found.error


def main() -> None:
    """Run and report."""
    options = parser(__doc__).parse_args()
    results = {}
    for name in track(ROWS, "Explainers"):
        results[name] = measure(name, 3 if options.quick else 9)
    show(
        "Time over stock SHAP",
        ["class", "stock, ms", "with graph", "with backward", "value error", "certificate", "A/A"],
        [
            [name, r["stock_seconds"] * 1e3, *list(r.values())[1:-1], r["A/A"]["stock"]]
            for name, r in results.items()
        ],
    )
    settings = {**vars(options), "shap": shap.__version__}
    save(options.output, "adapter_shap", settings, results)


if __name__ == "__main__":
    main()
