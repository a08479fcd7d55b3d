"""Cost of Captum's classes through their adapters, relative to the stock classes.

Three columns: values alone (under ``torch.no_grad``), values with their graph, and both with the
backward pass to the parameters. Runs take turns; medians of the time that the processor spends on
them, which other work on the machine does not lengthen.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' table of classes

import captum.attr as ca
import torch
from _common import in_turns, parser, ratio, save, show
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors import differentiable
from tests.adapters.captum_table import ROWS, set_up


class Network(nn.Module):
    """A small convolutional network with everything that Captum's methods look for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()
        self.pool, self.second = nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1)
        self.last, self.head = nn.ReLU(), nn.Linear(16 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return ten logits."""
        hidden = self.second(self.pool(self.act(self.first(x))))
        return self.head(self.last(hidden).flatten(1))


REFERENCES = torch.randn(8, 1, 16, 16)
SEGMENTS = (torch.arange(256).reshape(1, 1, 16, 16) // 16).long()
FEW = (torch.arange(256).reshape(1, 1, 16, 16) // 64).long()
NEURON = {"neuron_selector": (3, 2, 2)}
TARGET = {"target": 1}


def calls() -> dict[str, dict[str, Any]]:
    """Options of each class: enough samples that its own work shows."""
    few = {"feature_mask": FEW, "n_samples": 20, **TARGET}
    shap = {"baselines": REFERENCES, "n_samples": 8, **TARGET}
    several = {"baselines": REFERENCES[:4], **TARGET}
    steps = {"n_steps": 10, **TARGET}
    return {
        "Deconvolution": TARGET,
        "DeepLift": TARGET,
        "DeepLiftShap": several,
        "FeatureAblation": {"feature_mask": SEGMENTS, **TARGET},
        "FeaturePermutation": {"feature_mask": SEGMENTS, **TARGET},
        "GradientShap": shap,
        "GuidedBackprop": TARGET,
        "GuidedGradCam": TARGET,
        "InputXGradient": TARGET,
        "IntegratedGradients": {**steps, "n_steps": 20},
        "InternalInfluence": steps,
        "KernelShap": few,
        "LRP": TARGET,
        "LayerActivation": {},
        "LayerConductance": steps,
        "LayerDeepLift": TARGET,
        "LayerDeepLiftShap": several,
        "LayerFeatureAblation": {"layer_mask": torch.arange(16).reshape(1, 16, 1, 1), **TARGET},
        "LayerFeaturePermutation": {"layer_mask": torch.arange(16).reshape(1, 16, 1, 1)},
        "LayerGradCam": TARGET,
        "LayerGradientShap": shap,
        "LayerGradientXActivation": TARGET,
        "LayerIntegratedGradients": steps,
        "LayerLRP": TARGET,
        "Lime": few,
        "NeuronConductance": {**steps, **NEURON},
        "NeuronDeconvolution": NEURON,
        "NeuronDeepLift": NEURON,
        "NeuronDeepLiftShap": {"baselines": REFERENCES[:4], **NEURON},
        "NeuronFeatureAblation": {"feature_mask": SEGMENTS, **NEURON},
        "NeuronGradient": NEURON,
        "NeuronGradientShap": {"baselines": REFERENCES, "n_samples": 8, **NEURON},
        "NeuronGuidedBackprop": NEURON,
        "NeuronIntegratedGradients": {"n_steps": 10, **NEURON},
        "NoiseTunnel": {"nt_samples": 8, **TARGET},
        "Occlusion": {"sliding_window_shapes": (1, 8, 8), "strides": (1, 4, 4), **TARGET},
        "Saliency": TARGET,
        "ShapleyValueSampling": {"feature_mask": SEGMENTS, "n_samples": 2, **TARGET},
        "ShapleyValues": {"feature_mask": FEW, **TARGET},
    }


def explainers() -> dict[str, tuple[Any, Any, Any, dict[str, Any]]]:
    """Make one of each class: model, explainer, what is explained, options."""
    model, x = Network(), torch.randn(16, 1, 16, 16)
    made: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {}
    for name, call in calls().items():
        layered = name.startswith(("Layer", "Neuron", "Internal")) or name == "GuidedGradCam"
        if name == "NoiseTunnel":
            explainer: Any = ca.NoiseTunnel(ca.Saliency(model))
        elif name == "LayerFeaturePermutation":  # stock fails for any target
            explainer = ca.LayerFeaturePermutation(lambda x: model(x)[:, 1], model.second)
        else:
            explainer = getattr(ca, name)(model, *([model.second] if layered else []))
        made[name] = (model, explainer, x[:2] if name in ("KernelShap", "Lime") else x, call)
    batches = DataLoader(TensorDataset(x), batch_size=8)
    ablation = ca.FeatureAblation(lambda x: model(x)[:, 1])
    made["DataLoaderAttribution"] = (
        model,
        ca.DataLoaderAttribution(ablation),
        batches,
        {"feature_mask": FEW, "perturbations_per_pass": 4},
    )
    for name in ("LimeBase", "LLMAttribution", "LLMGradientAttribution"):
        row, small, batch = set_up(name, ROWS[name].model)
        made[name] = (small, row.make(small), row.subject(batch), row.call(small))
    return made


def main() -> None:
    """Run and report."""
    options = parser(__doc__).parse_args()
    torch.manual_seed(0)
    results, rows = {}, []
    for name, (model, stock, subject, call) in sorted(explainers().items()):
        adapter = differentiable(stock)
        parameters = [p for p in model.parameters() if p.requires_grad]
        runs = _runs(stock, adapter, subject, call, parameters)
        once = statistics.median(in_turns(runs, 2, time.process_time)[0]["stock"])
        rounds = 5 if options.quick else min(150, max(15, int(0.6 / once)))
        seconds, again = in_turns(runs, rounds, time.process_time, "stock")
        stock_seconds = seconds.pop("stock")
        ratios = {k: ratio(s, stock_seconds) for k, s in seconds.items()}
        results[name] = {"stock_seconds": statistics.median(stock_seconds), **ratios}
        results[name]["A/A"] = again
        milliseconds = results[name]["stock_seconds"] * 1e3
        rows.append([name, milliseconds, *ratios.values(), again["stock"]])
    show(
        "Time over stock Captum",
        ["class", "stock, ms", "values", "with graph", "with backward", "A/A"],
        rows,
    )
    save(options.output, "adapter_overhead", vars(options), results)


def _runs(
    stock: Any, adapter: Any, x: Any, call: dict[str, Any], parameters: list[Tensor]
) -> dict[str, Callable[[], object]]:
    def values() -> object:
        with torch.no_grad():
            return adapter.attribute(x, **call)

    def with_backward() -> object:
        found = adapter.attribute(x, **call)
        found = getattr(found, "seq_attr", found)
        found = found if isinstance(found, tuple) else (found,)
        loss = torch.stack([f.square().sum() for f in found]).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return {
        "stock": lambda: stock.attribute(x.clone() if isinstance(x, Tensor) else x, **call),
        "values": values,
        "with graph": lambda: adapter.attribute(x, **call),
        "with backward": with_backward,
    }


if __name__ == "__main__":
    main()
