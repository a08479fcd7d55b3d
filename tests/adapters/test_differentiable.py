"""``differentiable``: drop-in for Captum, idempotent, extensible, and closed to the rest."""

from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

from captum_priors import ExpectedGradients, NotDifferentiableError, differentiable
from tests.asserts import assert_same_numbers, parameter_gradients, relative_error
from tests.cases import DIFFERENTIATIONS, mlp, tuple_inputs


def test_idempotent_and_changes_differentiation_on_a_copy() -> None:
    adapter = differentiable(Saliency(mlp().model))
    assert differentiable(adapter) is adapter
    with pytest.raises(TypeError, match="differentiable\\(Saliency\\(model\\)"):
        differentiable(Saliency, differentiation="recompute")
    other = differentiable(adapter, differentiation="recompute")
    assert (other.differentiation, adapter.differentiation) == ("recompute", "double_backprop")
    own = ExpectedGradients(mlp().model, differentiation="recompute")
    assert differentiable(own) is own
    assert differentiable(own, differentiation="finite_difference") is not own


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_convergence_delta_and_options(way: str) -> None:
    case = tuple_inputs()
    stock = IntegratedGradients(case.model, multiply_by_inputs=False)
    adapter = differentiable(stock, differentiation=way)
    for rows in (None, 9):
        call = {
            **case.call,
            "n_steps": 6,
            "internal_batch_size": rows,
            "return_convergence_delta": True,
            "baselines": (0.5, case.baselines[1][:1]),
        }
        found, expected = (e.attribute(case.inputs, **call) for e in (adapter, stock))
        assert_same_numbers(found[0], expected[0])
        assert_same_numbers(found[1], expected[1])


def test_positional_arguments_in_each_class_own_order() -> None:
    case = mlp()
    assert_same_numbers(
        differentiable(Saliency(case.model)).attribute(case.inputs, 2, False),
        Saliency(case.model).attribute(case.inputs, 2, False),
    )
    assert_same_numbers(
        differentiable(IntegratedGradients(case.model)).attribute(
            case.inputs, case.baselines[:1], 2, None, 4
        ),
        IntegratedGradients(case.model).attribute(case.inputs, case.baselines[:1], 2, None, 4),
    )
    with pytest.raises(TypeError, match="n_stepz"):
        differentiable(IntegratedGradients(case.model)).attribute(case.inputs, n_stepz=4)


def test_gradient_reaches_learned_baselines() -> None:
    case = mlp()
    learned = torch.randn(1, 4, requires_grad=True)
    found = []
    for way in ("double_backprop", "recompute"):
        adapter = differentiable(IntegratedGradients(case.model), differentiation=way)
        value = adapter.attribute(case.inputs, baselines=learned, target=1, n_steps=9)
        found.append(parameter_gradients(value, [learned, *case.model.parameters()]))
    assert relative_error(found[1], found[0]) < 1e-12  # sums in another order


def test_captum_composes_with_it() -> None:
    case = mlp()
    stock = IntegratedGradients(case.model)
    adapter = differentiable(stock)
    call = {"target": case.target, "n_steps": 5}
    results = []
    for explainer in (stock, adapter):
        torch.manual_seed(1)
        tunnel = NoiseTunnel(explainer).attribute(case.inputs, nt_samples=3, **call)
        sensitivity = sensitivity_max(explainer.attribute, case.inputs, **call)
        attributions = explainer.attribute(case.inputs, **call)
        faithless = infidelity(
            case.model,
            lambda x: (torch.full_like(x, 0.1), x - 0.1),
            case.inputs,
            attributions.detach(),
            target=case.target,
        )
        results.append((tunnel, sensitivity, faithless))
    for found, expected in zip(results[1], results[0], strict=True):
        assert_same_numbers(found.detach(), expected)


def test_outputs_of_one_number_in_any_shape() -> None:
    """Captum asks for one number for each example, not for a shape."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(4, 1, 1, 1)
    stock = IntegratedGradients(model)
    for way in DIFFERENTIATIONS:
        found = differentiable(stock, differentiation=way).attribute(x)
        assert_same_numbers(found.detach(), stock.attribute(x))


def test_shap_is_refused_by_name() -> None:
    explainer = type("KernelExplainer", (), {"__module__": "shap.explainers._kernel"})()
    with pytest.raises(NotDifferentiableError, match="found KernelExplainer"):
        differentiable(explainer)


def test_a_differentiation_that_nobody_would_honour_is_refused() -> None:
    class Mine:
        def attribute(self, inputs: Tensor) -> Tensor:
            return inputs

    with pytest.raises(NotDifferentiableError, match="which brings its own graph"):
        differentiable(Mine(), differentiation="recompute")


def test_own_explainers_pass_and_can_be_registered() -> None:
    class Mine:
        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            return inputs

    mine = Mine()
    assert differentiable(mine) is mine

    class Registered(Mine):
        pass

    seen = []

    def convert(explainer: Any, differentiation: str) -> Any:
        seen.append(differentiation)
        return mine

    differentiable.register(Registered, convert)
    assert differentiable(Registered()) is mine
    assert differentiable(Registered(), differentiation="recompute") is mine
    assert seen == ["double_backprop", "recompute"]
    with pytest.raises(TypeError, match="a class and a function"):
        differentiable.register(mine, convert)
