"""A training step with an expected-gradients prior at the size of ResNet-50 and of ViT-B, on a GPU.

Both are built from their configurations, with random weights. Absolute times, peak memory of the
device, and a profile of the prior's step. Needs CUDA and transformers; without a GPU it says so and
ends.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import parser, save, show
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from captum_priors import AttributionPrior, ExpectedGradients, Lazy
from captum_priors.penalties import total_variation

SIZE, CLASSES, WEIGHT = 224, 1000, 1e-3
# The ways to the parameter gradient; only the last keeps the transformer's fused attention.
WAYS = ("double_backprop", "recompute", "finite_difference")


class Logits(nn.Module):
    """A Hugging Face classifier as a function from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def resnet50() -> nn.Module:
    """25.6 million parameters."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(ResNetForImageClassification(ResNetConfig(num_labels=CLASSES)))


def vit_b() -> nn.Module:
    """86 million parameters, patches of 16 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig(num_labels=CLASSES)))


MODELS = {"ResNet-50": resnet50, "ViT-B/16": vit_b}


def step_of(model: nn.Module, x: Tensor, y: Tensor, prior: Any) -> Callable[[], None]:
    """One training step in bfloat16 autocast, with the prior or without."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def run() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
            if prior is not None:
                loss = loss + WEIGHT * prior(x, target=y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def measure(run: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Median seconds and peak gigabytes, or why it did not run."""
    try:
        run()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # out of memory, for example
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": statistics.median(seconds), "peak_gb": peak}


def where_time_goes(run: Callable[[], None]) -> list[dict[str, Any]]:
    """The operators that take most of the device's time in one step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    top = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:15]
    return [
        {"operator": e.key, "calls": e.count, "device_ms": e.self_device_time_total / 1e3}
        for e in top
    ]


def main() -> None:
    """Run and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=64)
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        print("gpu_training_step: skipped, no CUDA device.")
        return
    device = torch.device("cuda")
    rounds = 3 if options.quick else 10
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().to(device)
        x = torch.randn(options.batch, 3, SIZE, SIZE, device=device)
        y = torch.randint(CLASSES, (options.batch,), device=device)
        found: dict[str, Any] = {"plain": measure(step_of(model, x, y, None), rounds)}
        for way in WAYS:
            for k in (1, 4):
                prior = AttributionPrior(
                    ExpectedGradients(model, differentiation=way),
                    total_variation,
                    n_samples=k,
                    baselines=x,
                )
                found[f"{way}, k = {k}"] = measure(step_of(model, x, y, prior), rounds)
                if k == 1 and way == WAYS[0]:
                    lazy = step_of(model, x, y, Lazy(prior, 4))
                    found[f"{way}, k = 1, mean of Lazy(4)"] = _mean_of_four(lazy, rounds)
                    profiled = step_of(model, x, y, prior)
                    if "seconds" in found[f"{way}, k = {k}"]:
                        found["profile"] = where_time_goes(profiled)
                torch.cuda.empty_cache()
        results[name] = found
        rows = [
            [kind, f.get("seconds", f.get("error", "")), f.get("peak_gb", "")]
            for kind, f in found.items()
            if kind != "profile"
        ]
        show(f"{name}, batch {options.batch}", ["step", "seconds", "peak GB"], rows)
        save(options.output, "gpu_training_step", vars(options), results)


def _mean_of_four(step: Callable[[], None], rounds: int) -> dict[str, Any]:
    """One step out of four has the prior."""

    def four() -> None:
        for _ in range(4):
            step()

    found = measure(four, rounds)
    return {**found, "seconds": found["seconds"] / 4} if "seconds" in found else found


if __name__ == "__main__":
    main()
