"""Cost of Captum's classes through their adapters, relative to the stock classes.

Three columns: values alone (under ``torch.no_grad``), values with their graph, and both with the
backward pass to the parameters. Runs take turns; medians.
"""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import torch
from _common import interleaved, parser, save, show
from torch import Tensor, nn

from captum_priors import differentiable


def network() -> nn.Module:
    """Return a small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


def explainers(model: nn.Sequential) -> dict[str, tuple[Any, dict[str, Any]]]:
    """One of each kind, with its options."""
    references = torch.randn(8, 1, 16, 16)
    mask = (torch.arange(256).reshape(1, 1, 16, 16) // 16).long()
    return {
        "Saliency": (ca.Saliency(model), {}),
        "IntegratedGradients": (ca.IntegratedGradients(model), {"n_steps": 20}),
        "GradientShap": (ca.GradientShap(model), {"baselines": references, "n_samples": 8}),
        "GuidedBackprop": (ca.GuidedBackprop(model), {}),
        "DeepLift": (ca.DeepLift(model), {}),
        "FeatureAblation": (ca.FeatureAblation(model), {"feature_mask": mask}),
        "ShapleyValueSampling": (
            ca.ShapleyValueSampling(model),
            {"feature_mask": mask, "n_samples": 2},
        ),
        "KernelShap": (ca.KernelShap(model), {"feature_mask": mask, "n_samples": 20}),
        "LayerGradCam": (ca.LayerGradCam(model, model[3]), {}),
        "LayerConductance": (ca.LayerConductance(model, model[3]), {"n_steps": 10}),
        "NoiseTunnel": (ca.NoiseTunnel(ca.Saliency(model)), {"nt_samples": 8}),
    }


def main() -> None:
    """Run and report."""
    options = parser(__doc__).parse_args()
    torch.manual_seed(0)
    model, x = network(), torch.randn(16, 1, 16, 16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results, rows = {}, []
    for name, (stock, call) in explainers(model).items():
        adapter = differentiable(stock)
        batch = x[:2] if name == "KernelShap" else x
        runs = _runs(stock, adapter, batch, {**call, "target": 1}, parameters)
        seconds = interleaved(runs, rounds=5 if options.quick else 15)
        ratios = {k: s / seconds["stock"] for k, s in seconds.items() if k != "stock"}
        results[name] = {"stock_seconds": seconds["stock"], **ratios}
        rows.append([name, seconds["stock"] * 1e3, *ratios.values()])
    show(
        "Time over stock Captum",
        ["class", "stock, ms", "values", "with graph", "with backward"],
        rows,
    )
    save(options.output, "adapter_overhead", vars(options), results)


def _runs(
    stock: Any, adapter: Any, x: Tensor, call: dict[str, Any], parameters: list[Tensor]
) -> dict[str, Callable[[], object]]:
    def values() -> object:
        with torch.no_grad():
            return adapter.attribute(x, **call)

    def with_backward() -> object:
        loss = adapter.attribute(x, **call).square().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return {
        "stock": lambda: stock.attribute(x.clone(), **call),
        "values": values,
        "with graph": lambda: adapter.attribute(x, **call),
        "with backward": with_backward,
    }


if __name__ == "__main__":
    main()
