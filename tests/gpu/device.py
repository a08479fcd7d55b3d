"""The device of these tests: CUDA's, or what ``CAPTUM_PRIORS_DEVICE`` names.

With ``cpu`` they test themselves, on a machine without a GPU.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients
from captum_priors.penalties import l2

DEVICE = torch.device(os.environ.get("CAPTUM_PRIORS_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda" and torch.cuda.is_available()

needs_device = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


def on_device(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Move modules and tensors, also those in tuples and dictionaries; floats get the dtype."""
    if isinstance(value, nn.Module):
        return value.to(DEVICE, dtype)
    if isinstance(value, Tensor):
        return value.to(DEVICE, dtype if value.is_floating_point() else None)
    if isinstance(value, tuple):
        return tuple(on_device(each, dtype) for each in value)
    if isinstance(value, dict):
        return {name: on_device(each, dtype) for name, each in value.items()}
    return value


def eg_prior(model: Any, way: Any, x: Tensor) -> AttributionPrior:
    explainer = ExpectedGradients(model, differentiation=way)
    return AttributionPrior(explainer, l2, baselines=x, n_samples=2)
