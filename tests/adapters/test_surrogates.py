"""LIME and KernelSHAP beyond their rows in the table: masks, priors, and what is held fixed."""

from typing import Any

import captum.attr as ca
import pytest
import torch
from captum._utils.models.linear_model import (
    SkLearnRidge,
)
from torch import Tensor

from captum_priors import AttributionPrior, NotDifferentiableError, differentiable
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import in_double
from tests.asserts import leaves_no_trace, parameter_gradients
from tests.cases import cnn, mlp

pytestmark = pytest.mark.filterwarnings(
    # Captum's advice about speed.
    "ignore:You are providing multiple inputs for Lime / Kernel SHAP",
    # Where the lasso is asked for more than float64 holds; the certificate says if it was enough.
    "ignore:Objective did not converge",
)


OPTIONS: dict[str, Any] = {"n_samples": 30, "target": 1}


def test_certificate_on_images_with_a_feature_mask() -> None:
    case = cnn()
    mask = (torch.arange(64).reshape(1, 1, 8, 8) // 16).expand(3, 1, 8, 8)
    explainer = differentiable(ca.KernelShap(case.model))
    with in_double(needed=True):
        check_differentiable(
            explainer,
            case.inputs,
            parameters=case.model.named_parameters(),
            feature_mask=mask,
            n_samples=20,
            target=1,
        )


def test_in_a_prior_without_a_trace() -> None:
    case = mlp()
    stock = ca.KernelShap(case.model)
    prior = AttributionPrior(stock, l2, n_samples=20)
    with leaves_no_trace(case.model, tensors=[case.inputs]):
        value = prior(case.inputs, target=1)
        gradients = parameter_gradients(value, list(case.model.parameters()))
    assert any(float(g.abs().max()) > 0 for g in gradients)
    assert stock.interpretable_model.linear is None  # the user's explainer is not fitted


def test_inputs_with_a_graph_are_refused() -> None:
    case = mlp()
    explainer = differentiable(ca.Lime(case.model))
    with pytest.raises(NotDifferentiableError, match="held fixed: detach"):
        explainer.attribute(case.inputs.requires_grad_(), **OPTIONS)


def test_sample_weights_with_a_graph_are_refused() -> None:
    """Their derivative is not part of the Jacobian."""
    case = mlp()

    def on_features(original: Tensor, perturbed: Tensor, _: Any, **__: Any) -> Tensor:
        features = case.model[0](original) - case.model[0](perturbed)
        return torch.exp(-features.square().sum())

    ridge = SkLearnRidge(alpha=0.1)
    explainer = differentiable(ca.Lime(case.model, ridge, similarity_func=on_features))
    with pytest.raises(NotDifferentiableError, match="that are constants"):
        explainer.attribute(case.inputs[:1], **OPTIONS)
    learned = torch.randn(1, 4, requires_grad=True)
    kernel = ca.KernelShap(case.model)  # its weights count masks, whatever the baseline
    found = differentiable(kernel).attribute(case.inputs[:1], baselines=learned, **OPTIONS)
    assert float(torch.autograd.grad(found.square().sum(), learned)[0].abs().max()) > 0
