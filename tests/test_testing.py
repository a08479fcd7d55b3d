"""``check_differentiable`` itself: what it measures, what it leaves alone, what it refuses."""

from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from captum_priors import NotDifferentiableError, differentiable
from captum_priors.testing import Certificate, check_differentiable
from tests.asserts import leaves_no_trace
from tests.cases import Scaled, tuple_inputs


class Gradient:
    """The input gradient of a two-layer network by hand, with other factors of some slopes."""

    def __init__(self, *parts: nn.Module, **slopes: float) -> None:
        self.parts = parts or (nn.Linear(3, 4), nn.Linear(4, 1))
        self.slopes = slopes
        self.named = dict(nn.Sequential(*self.parts).named_parameters())
        self.model = nn.Sequential(*self.parts) if not parts else None

    def attribute(self, inputs: Tensor) -> Tensor:
        first, bias, last = (
            Scaled.apply(self.named[name], self.slopes.get(name, 1.0))
            for name in ("0.weight", "0.bias", "1.weight")
        )
        hidden = torch.tanh(inputs @ first.T + bias)
        return (last * (1 - hidden.square())) @ first


def checked(explainer: Any, **options: Any) -> Certificate:
    options = {"parameters": [*explainer.named.items()], **options}
    return check_differentiable(explainer, torch.randn(2, 3), raise_exception=False, **options)


def test_error_is_zero_for_a_right_gradient_and_names_every_parameter() -> None:
    found = checked(Gradient())
    assert found.passed
    assert found.error < 1e-8
    # The last bias has no influence: its derivative is zero on both sides.
    assert set(found.errors) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert found.errors["1.bias"] == 0


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight"])
@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf"), -float("inf")])
def test_every_wrong_parameter_is_named_wherever_it_is(name: str, slope: float) -> None:
    """A graph is there, and it is wrong for one of them."""
    explainer = Gradient(**{name: slope})
    named = [*explainer.named.items()]
    for parameters in (named, named[::-1]):
        found = checked(explainer, parameters=parameters)
        assert not found.passed
        assert not found.errors[name] <= found.tolerance
        with pytest.raises(NotDifferentiableError, match=f"'{name}'"):
            check_differentiable(explainer, torch.randn(2, 3), parameters=parameters)


@pytest.mark.parametrize("values", [[float("nan"), 0.0], [0.0, float("nan")]])
def test_certificates_of_nan_values_fail(values: list[float]) -> None:
    errors = dict(zip("ab", values, strict=True))
    assert not Certificate(error=float("nan"), errors=errors, tolerance=1.0).passed


def test_small_errors_are_seen_and_tolerance_decides() -> None:
    off = dict.fromkeys(("0.weight", "0.bias", "1.weight"), 1.001)
    assert 2e-4 < checked(Gradient(**off)).error < 2e-3
    assert checked(Gradient(**off), tolerance=1e-2).passed


def test_leaves_no_trace() -> None:
    case = tuple_inputs()
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    explainer = differentiable(IntegratedGradients(case.model))
    with leaves_no_trace(case.model, tensors=case.inputs):
        check_differentiable(explainer, case.inputs, n_steps=3, **case.call)

    class Broken:
        model = case.model

        def attribute(self, inputs: Any) -> Any:
            torch.randn(3)
            raise KeyError

    with leaves_no_trace(case.model, tensors=case.inputs), pytest.raises(KeyError):
        check_differentiable(Broken(), case.inputs)


def test_what_certifies_nothing_is_refused() -> None:
    frozen = Gradient()
    frozen.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters=model\.named_parameters\(\)"):
        check_differentiable(frozen, torch.randn(2, 3))
    constant = type("Constant", (), {"attribute": lambda self, inputs: inputs})()
    constant.model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="all zero, which certifies nothing"):
        check_differentiable(constant, torch.randn(2, 3))


def test_parameters_of_one_name_are_all_checked() -> None:
    """The first of them is missing from the graph; the last of them is right."""

    class Holder(Gradient):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 3), nn.Linear(3, 1), **{"0.weight": 0.0})
            self.first, self.second = self.parts

    explainer = Holder()
    found = check_differentiable(explainer, torch.randn(2, 3), raise_exception=False)
    assert not found.passed
    assert max(found.errors, key=lambda name: found.errors[name]) == "0:Linear.weight"
    assert len(found.errors) == 4
    both = [("weight", part.weight) for part in explainer.parts]
    assert not checked(explainer, parameters=both).passed
    assert set(checked(explainer, parameters=both[1:]).errors) == {"weight"}
