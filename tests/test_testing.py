"""The certificate itself: what it measures, what it leaves alone, what it refuses."""

from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from captum_priors import ExpectedGradients, NotDifferentiableError, differentiable
from captum_priors.testing import check_differentiable
from tests.asserts import leaves_no_trace
from tests.cases import mlp, tuple_inputs


class Gradient:
    """The input gradient of a two-layer network, written out by hand."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def attribute(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.model[0](inputs))
        return (self.model[1].weight * (1 - hidden.square())) @ self.model[0].weight


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def test_error_is_zero_for_a_right_gradient_and_names_every_parameter() -> None:
    model = two_layers()
    found = check_differentiable(Gradient(model), torch.randn(2, 3))
    assert found.passed
    assert found.error < 1e-8
    # The last bias has no influence: its derivative is zero on both sides.
    assert set(found.errors) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert found.errors["1.bias"] == 0


@pytest.mark.parametrize("missing", ["0.weight", "0.bias", "1.weight"])
def test_every_missing_parameter_is_noticed(missing: str) -> None:
    """Detach one parameter at a time: a graph remains, and it is wrong."""
    model = two_layers()

    class Partial(Gradient):
        def attribute(self, inputs: Tensor) -> Tensor:
            tensors = {
                name: p.detach() if name == missing else p
                for name, p in self.model.named_parameters()
            }
            hidden = torch.tanh(inputs @ tensors["0.weight"].T + tensors["0.bias"])
            return (tensors["1.weight"] * (1 - hidden.square())) @ tensors["0.weight"]

    x = torch.randn(2, 3)
    assert Partial(model).attribute(x).requires_grad
    found = check_differentiable(Partial(model), x, raise_exception=False)
    assert not found.passed
    assert max(found.errors, key=lambda name: found.errors[name]) == missing
    with pytest.raises(NotDifferentiableError, match=f"the largest at '{missing}'"):
        check_differentiable(Partial(model), x)


def test_small_errors_are_seen_and_tolerance_decides() -> None:
    model = two_layers()

    class Off(Gradient):
        def attribute(self, inputs: Tensor) -> Tensor:
            right = super().attribute(inputs)
            return right + 1e-3 * (right - right.detach())  # same value, slope 0.1 % too steep

    x = torch.randn(2, 3)
    found = check_differentiable(Off(model), x, raise_exception=False)
    assert 2e-4 < found.error < 2e-3
    assert check_differentiable(Off(model), x, tolerance=1e-2).passed


def test_random_explainers_get_the_same_numbers() -> None:
    case = mlp()
    explainer = ExpectedGradients(case.model)
    options: dict[str, Any] = {"baselines": case.baselines, "target": 1, "n_samples": 2}
    assert check_differentiable(explainer, case.inputs, **options).passed


def test_leaves_no_trace() -> None:
    case = tuple_inputs()
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    explainer = differentiable(IntegratedGradients(case.model))
    with leaves_no_trace(case.model, tensors=case.inputs):
        check_differentiable(explainer, case.inputs, n_steps=3, **case.call)

    class Broken:
        def __init__(self) -> None:
            self.model = case.model

        def attribute(self, inputs: Any) -> Any:
            torch.randn(3)
            raise KeyError

    with leaves_no_trace(case.model, tensors=case.inputs), pytest.raises(KeyError):
        check_differentiable(Broken(), case.inputs)


def test_bad_input() -> None:
    model, x = two_layers(), torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"copy\.deepcopy\(model\)\.double\(\)"):
        check_differentiable(Gradient(two_layers().float()), x.float())
    with pytest.raises(ValueError, match=r"parameters=model\.named_parameters\(\)"):
        check_differentiable(Gradient(model.requires_grad_(False)), x)
    constant = type("Constant", (), {"attribute": lambda self, inputs: inputs})()
    constant.model = two_layers()
    with pytest.raises(ValueError, match="all zero, which certifies nothing"):
        check_differentiable(constant, x)


def test_parameters_can_be_chosen() -> None:
    model = two_layers()
    found = check_differentiable(
        Gradient(model), torch.randn(2, 3), parameters=model[0].named_parameters()
    )
    assert set(found.errors) == {"weight", "bias"}


def test_parameters_of_one_name_in_two_modules() -> None:
    """The first of them is missing from the graph; the last of them is right."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)

    class Forgetful:
        def __init__(self) -> None:
            self.first, self.second = first, second

        def attribute(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(inputs @ first.weight.detach().T + first.bias)
            return (second.weight * (1 - hidden.square())) @ first.weight.detach()

    found = check_differentiable(Forgetful(), torch.randn(2, 3), raise_exception=False)
    assert not found.passed
    assert max(found.errors, key=lambda name: found.errors[name]) == "0:Linear.weight"
    assert len(found.errors) == 4


def test_parameters_of_one_name_are_all_checked() -> None:
    """The first of two is missing from the graph, the last is right."""
    model = two_layers()

    class Forgetful(Gradient):
        def attribute(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(inputs @ model[0].weight.detach().T + model[0].bias)
            return (model[1].weight * (1 - hidden.square())) @ model[0].weight.detach()

    both = [("weight", model[0].weight), ("weight", model[1].weight)]
    found = check_differentiable(
        Forgetful(model), torch.randn(2, 3), parameters=both, raise_exception=False
    )
    assert not found.passed
