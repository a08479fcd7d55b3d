"""SHAP's explainers of a model on a GPU, made where SHAP has its models: in NumPy."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("shap")

from captum_priors.adapters.shap import ROWS
from captum_priors.testing import check_differentiable
from tests.adapters.shap_cases import PAIRS, QUICK, adapted, holds_torch, model_for, stock, table
from tests.asserts import assert_same_numbers, parameter_gradients, relative_error
from tests.gpu.device import needs_device, on_device

pytestmark = needs_device


def attributed(name: str, model: Any, explainer: Any, target: Any) -> tuple[Any, list[Any]]:
    """Attributions and their parameter gradient, on the CPU, under one seed."""
    np.random.seed(3)  # noqa: NPY002  # SHAP's generator
    adapter = adapted(name, explainer, model)
    x = torch.as_tensor(table(3, 1)).to(next(model.parameters()))
    found = adapter.attribute(x, target=target, **QUICK.get(name, {}))
    gradients = parameter_gradients(found, list(model.parameters()))
    return found.cpu(), [g.cpu() for g in gradients]


@pytest.mark.parametrize(("name", "outputs"), PAIRS)
def test_same_numbers_and_gradients_as_on_the_cpu(name: str, outputs: int) -> None:
    here = model_for(name, outputs).eval()
    there = on_device(copy.deepcopy(here))
    target = None if outputs == 1 else 1
    expected, gradients = attributed(name, here, stock(name, here), target)
    # SHAP's own function of NumPy arrays stays where it was.
    found, others = attributed(
        name, there, stock(name, there if holds_torch(name) else here), target
    )
    assert_same_numbers(found, expected)
    assert relative_error(others, gradients) < 1e-8  # other summation order


@pytest.mark.parametrize("name", ROWS)
def test_certificate(name: str) -> None:
    here = model_for(name, 1).eval()
    there = on_device(copy.deepcopy(here))
    adapter = adapted(name, stock(name, there if holds_torch(name) else here), there)
    x = torch.as_tensor(table(3, 1)).to(next(there.parameters()))
    parameters = list(there.named_parameters())
    check_differentiable(adapter, x, parameters=parameters, **QUICK.get(name, {}))
