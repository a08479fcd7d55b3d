"""``differentiable``: drop-in for Captum, idempotent, extensible, and closed to the rest."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from captum.attr import (
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

from captum_priors import (
    CaptumAdapter,
    ExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from tests.asserts import (
    assert_same_numbers,
    leaves_no_trace,
    parameter_gradients,
    relative_error,
)
from tests.cases import DIFFERENTIATIONS, mlp, tuple_inputs

ADAPTED: list[Any] = [Saliency, InputXGradient, IntegratedGradients]


@pytest.mark.parametrize("cls", ADAPTED)
def test_is_an_instance_with_the_same_signature(cls: Any) -> None:
    stock = cls(mlp().model)
    adapter = differentiable(stock)
    assert isinstance(adapter, cls)
    assert isinstance(adapter, CaptumAdapter)
    assert inspect.signature(adapter.attribute) == inspect.signature(stock.attribute)
    assert adapter.has_convergence_delta() == stock.has_convergence_delta()
    # Captum calls attribute.__wrapped__ where it composes methods: it must be ours.
    assert type(adapter).attribute.__wrapped__ is not cls.attribute.__wrapped__


@pytest.mark.parametrize("cls", ADAPTED)
def test_class_is_a_drop_in_subclass(cls: Any) -> None:
    case = mlp()
    adapted = differentiable(cls)
    assert issubclass(adapted, cls)
    assert differentiable(adapted) is adapted
    expected = cls(case.model).attribute(case.inputs, target=1)
    assert_same_numbers(adapted(case.model).attribute(case.inputs, target=1), expected)


def test_idempotent_and_changes_differentiation_on_a_copy() -> None:
    adapter = differentiable(Saliency(mlp().model))
    assert differentiable(adapter) is adapter
    other = differentiable(adapter, differentiation="recompute")
    assert (other.differentiation, adapter.differentiation) == ("recompute", "double_backprop")
    own = ExpectedGradients(mlp().model, differentiation="recompute")
    assert differentiable(own) is own
    assert differentiable(own, differentiation="finite_difference") is not own


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("cls", ADAPTED)
def test_explainer_and_inputs_are_untouched(cls: Any, way: str) -> None:
    case = mlp()
    stock = cls(case.model)
    before = dict(vars(stock))
    adapter = differentiable(stock, differentiation=way)
    with leaves_no_trace(case.model, tensors=[case.inputs]):
        adapter.attribute(case.inputs, target=1)
    assert vars(stock) == before

    def broken(x: Tensor) -> Tensor:
        case.model(x)
        raise RuntimeError("out of luck")

    adapter.forward_func = broken
    raises = pytest.raises(RuntimeError, match="out of luck")
    with leaves_no_trace(case.model, tensors=[case.inputs]), raises:
        adapter.attribute(case.inputs, target=1)


@pytest.mark.parametrize("cls", ADAPTED)
def test_pickles_and_copies(cls: Any) -> None:
    case = mlp()
    adapter = differentiable(cls(case.model), differentiation="recompute")
    expected = adapter.attribute(case.inputs, target=1)
    for twin in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter), copy.copy(adapter)):
        assert twin.differentiation == "recompute"
        assert_same_numbers(twin.attribute(case.inputs, target=1), expected)


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


def test_subclasses_of_adapted_classes_are_refused() -> None:
    class Mine(Saliency):
        pass

    with pytest.raises(NotDifferentiableError, match="found Mine"):
        differentiable(Mine(mlp().model))


def test_shap_is_refused_by_name() -> None:
    explainer = type("KernelExplainer", (), {"__module__": "shap.explainers._kernel"})()
    with pytest.raises(NotDifferentiableError, match="found KernelExplainer"):
        differentiable(explainer)


def test_what_is_no_explainer_is_refused() -> None:
    with pytest.raises(TypeError, match="Captum's attribute"):
        differentiable(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'recompute'"):
        differentiable(Saliency(mlp().model), differentiation="exact")
    with pytest.raises(TypeError, match="differentiable\\(Saliency\\(model\\)"):
        differentiable(Saliency, differentiation="recompute")


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
