"""What ``recompute`` promises: exact gradients in memory that does not grow with the samples."""

import weakref
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_priors import ExpectedGradients, differentiable
from tests.asserts import parameter_gradients


class PeakBytes(TorchDispatchMode):
    """Bytes of all tensor storages made in the block that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.peak = max(self.peak, sum(self.alive.values()))


def peak_of_a_step(model: nn.Module, attribute: Any) -> int:
    with PeakBytes() as memory:
        parameter_gradients(attribute(), list(model.parameters()))
    return memory.peak


def convolutions() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(6 * 64, 3)
    )
    return model, torch.randn(4, 1, 8, 8)


@pytest.mark.parametrize("explainer", ["IntegratedGradients", "ExpectedGradients"])
def test_peak_is_flat_in_the_number_of_samples(explainer: str) -> None:
    model, x = convolutions()

    def step(way: Any, n: int) -> int:
        if explainer == "IntegratedGradients":
            ig = differentiable(IntegratedGradients(model), differentiation=way)
            return peak_of_a_step(model, lambda: ig.attribute(x, target=1, n_steps=n))
        eg = ExpectedGradients(model, differentiation=way)
        return peak_of_a_step(model, lambda: eg.attribute(x, x, n_samples=n, target=1))

    few, many = (step("recompute", n) for n in (16, 512))
    assert many <= 1.3 * few
    # The measurement sees memory where it does grow.
    assert step("double_backprop", 64) > 3 * step("double_backprop", 16)
