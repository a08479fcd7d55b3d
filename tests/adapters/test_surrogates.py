"""LIME and KernelSHAP: stock numbers, and the exact Jacobian of the fitted surrogate."""

from typing import Any

import captum.attr as ca
import pytest
import torch
from captum._utils.models.linear_model import (
    SGDLasso,
    SkLearnLasso,
    SkLearnLinearRegression,
    SkLearnRidge,
)
from torch import Tensor

from captum_priors import AttributionPrior, NotDifferentiableError, differentiable
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import in_double
from tests.asserts import assert_same_numbers, leaves_no_trace, parameter_gradients
from tests.cases import EXACT, cnn, mlp

pytestmark = pytest.mark.filterwarnings(
    # Captum's advice about speed.
    "ignore:You are providing multiple inputs for Lime / Kernel SHAP",
    # Where the lasso is asked for more than float64 holds; the certificate says if it was enough.
    "ignore:Objective did not converge",
)


def similarity(original: Tensor, perturbed: Tensor, interpretable: Tensor, **_: Any) -> float:
    return 0.3 + float(interpretable.sum()) / 10


def perturb(original: Tensor, **_: Any) -> Tensor:
    return torch.bernoulli(torch.full((1, 4), 0.5))


def to_inputs(mask: Tensor, original: Tensor, **_: Any) -> Tensor:
    return mask * original


def explainers(model: Any) -> dict[str, Any]:
    return {
        "KernelShap": ca.KernelShap(model),
        "Lime-lasso": ca.Lime(model, interpretable_model=SkLearnLasso(alpha=1e-3)),
        "Lime-ridge": ca.Lime(model, interpretable_model=SkLearnRidge(alpha=0.5)),
        "Lime-regression": ca.Lime(
            model, interpretable_model=SkLearnLinearRegression(fit_intercept=False)
        ),
        "LimeBase": ca.LimeBase(
            model, SkLearnRidge(alpha=0.1), similarity, perturb, True, to_inputs, None
        ),
    }


NAMES = list(explainers(mlp().model))
OPTIONS: dict[str, Any] = {"n_samples": 30, "target": 1}


def inputs_of(name: str) -> Tensor:
    return mlp().inputs[:1] if name == "LimeBase" else mlp().inputs


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("name", NAMES)
def test_stock_values_under_one_seed(name: str, way: str) -> None:
    stock = explainers(mlp().model)[name]
    x = inputs_of(name)
    torch.manual_seed(2)
    expected = stock.attribute(x, **OPTIONS)
    torch.manual_seed(2)
    found = differentiable(stock, differentiation=way).attribute(x, **OPTIONS)
    assert_same_numbers(found, expected)


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("name", NAMES)
def test_certificate(name: str, way: str) -> None:
    """Captum fits in float32, where no difference quotient is exact: here in float64."""
    model = mlp().model
    stock = explainers(model)[name]
    if name == "Lime-lasso":  # coordinate descent has to converge beyond the certificate
        stock.interpretable_model.construct_kwargs.update(tol=1e-11, max_iter=1_000_000)
    explainer = differentiable(stock, differentiation=way)
    with in_double(needed=True):
        check_differentiable(
            explainer, inputs_of(name), parameters=model.named_parameters(), **OPTIONS
        )


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


def test_refusals() -> None:
    case = mlp()
    with pytest.raises(NotDifferentiableError, match="found SGDLasso"):
        differentiable(ca.Lime(case.model, interpretable_model=SGDLasso()))
    with pytest.raises(NotDifferentiableError, match="positive"):
        differentiable(ca.Lime(case.model, interpretable_model=SkLearnLasso(positive=True)))
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
