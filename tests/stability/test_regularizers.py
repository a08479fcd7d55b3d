"""Every regularizer on models that the laws do not have, in other precisions, and its options."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_priors import NotDifferentiableError
from captum_priors.priors import Prior
from captum_priors.stability import (
    ATEX,
    R2ET,
    ActivationSensitivity,
    AttributionAlignment,
    CurvatureRegularization,
    HessianPenalty,
    JacobianRegularization,
    RobustAttribution,
    SaliencyGuided,
)
from tests.asserts import (
    assert_same_numbers,
    assert_slope,
    gradients_of,
    leaves_no_trace,
    relative_error,
)
from tests.cases import Case, cnn, mlp, tuple_inputs
from tests.laws.leaves import REGULARIZERS, Leaf, way_options

every_regularizer = pytest.mark.parametrize("leaf", REGULARIZERS, ids=lambda leaf: leaf.name)
every_way = pytest.mark.parametrize(
    ("leaf", "way"),
    [
        pytest.param(leaf, way, id=f"{leaf.name}-{way}")
        for leaf in REGULARIZERS
        for way in leaf.ways
    ],
)


def labelled(case: Case) -> dict[str, Any]:
    """Keywords of a call with a class label for each example."""
    n = len(case.inputs[0] if isinstance(case.inputs, tuple) else case.inputs)
    return {"target": torch.arange(n) % 2, "additional_forward_args": case.args}


def made(leaf: Leaf, case: Case, **options: Any) -> Prior:
    """Make a regularizer whose value has all of its gradient: ATEX takes its own as a constant."""
    if leaf.cls is ATEX:
        teacher = copy.deepcopy(case.model).requires_grad_(False)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.3)
        options = {"explainer": Saliency(teacher), "teacher": teacher, **options}
    prior: Prior = leaf.make(case.model, **options).eval()  # the same draws at each call
    return prior


@every_way
@pytest.mark.parametrize("make", [cnn, tuple_inputs], ids=lambda make: make.__name__)
def test_certificate(leaf: Leaf, way: str, make: Callable[[], Case]) -> None:
    case = make()
    prior = made(leaf, case, **way_options(leaf, way))
    assert_slope(lambda: prior(case.inputs, **labelled(case)), list(case.model.parameters()))


@every_regularizer
def test_certificate_of_a_smoothed_network(leaf: Leaf) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    case = Case(model, torch.randn(5, 4), None, 0)
    prior = made(leaf, case, smooth=3)
    assert_slope(lambda: prior(case.inputs, **labelled(case)), list(model.parameters()))


@every_regularizer
@pytest.mark.parametrize("block", [nullcontext, torch.no_grad, torch.inference_mode])
def test_values_are_the_same_without_gradients_and_leave_no_trace(leaf: Leaf, block: Any) -> None:
    case = mlp()
    case.model[0].requires_grad_(False)
    x, prior = case.inputs.clone().requires_grad_(), made(leaf, case)
    expected = prior(case.inputs, **labelled(case))
    with leaves_no_trace(case.model, prior, tensors=[x]), block():
        value = prior(x, **labelled(case))
    assert value.requires_grad == (block is nullcontext)
    assert_same_numbers(value.detach(), expected.detach())
    expected.backward()
    assert case.model[0].weight.grad is None  # it is frozen
    assert case.model[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in REGULARIZERS if leaf.labels], ids=lambda leaf: leaf.name
)
def test_labels_are_needed(leaf: Leaf) -> None:
    case = mlp()
    prior = leaf.make(case.model)
    with leaves_no_trace(case.model, prior), pytest.raises(ValueError, match="class labels"):
        prior(case.inputs)
    prior.eval()  # the same draws each time
    values = [prior(case.inputs, target=y) for y in (1, [1] * 5, torch.tensor([1] * 5))]
    assert_same_numbers(values[0], values[1])
    assert_same_numbers(values[0], values[2])


BAD: dict[Any, list[dict[str, Any]]] = {
    HessianPenalty: [
        {"forward_func": None},
        *({"n_samples": 0}, {"curvature": "finite_difference"}, {"smooth": -1}),
        *({"reduction": "median"}, {"curvature": "difference", "step_size": 0}),
    ],
    JacobianRegularization: [{"differentiation": "recompute"}, {"n_samples": 0}],
    ATEX: [
        *({"forward_func": "model"}, {"forward_func": lambda x: x}, {"explainer": nn.ReLU()}),
        *({"spelling": 3}, {"radius": 0}, {"temperature": float("nan")}, {"n_samples": 0}),
    ],
    ActivationSensitivity: [
        *({"radius": 0.0}, {"power": 3}, {"scale": "weight"}, {"noise": "salt"}),
        *({"layers": "all"}, {"layers": ["8"]}, {"layers": [3]}),
    ],
    CurvatureRegularization: [{"step_size": 0}],
    R2ET: [{"top_k": 0}, {"n_nearest": 0}, {"curvature": -1}, {"step_size": 0}],
    SaliencyGuided: [{"fraction": 0}, {"fraction": 1.5}],
    RobustAttribution: [{"objective": "ig"}, {"step_size": 0}, {"step_num": 0}],
    AttributionAlignment: [{"top_k": 0}, {"radius": (0.1, -1)}],
}


@pytest.mark.parametrize("cls", BAD)
def test_bad_options_are_refused(cls: Any) -> None:
    needed = {"forward_func": mlp().model, **({"top_k": 2} if cls is R2ET else {})}
    for options in BAD[cls]:
        with pytest.raises((TypeError, ValueError), match=r"expected .* found"):
            cls(**{**needed, **options})


class Checkpointed(nn.Module):
    """Has dropout, which shows in a second run that does not hold the model still."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.checkpoints = True

    def hidden(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.body(x)), 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpoints:
            return self.head(self.hidden(x))
        hidden: Any = checkpoint(self.hidden, x, use_reentrant=False)
        return self.head(hidden)


@every_way
def test_checkpointing_is_refused_or_held_still(leaf: Leaf, way: str) -> None:
    model, x = Checkpointed(), torch.randn(5, 4)
    prior = leaf.make(model, **way_options(leaf, way), smooth=None).eval()
    holds = way == "finite_difference" and leaf.name not in ("SSR", "IG-SUM-NORM")
    holds = holds or leaf.name == "Hessian-twice"
    if not holds:
        with pytest.raises(NotDifferentiableError, match="without activation checkpointing"):
            prior(x, target=1)
        return
    parameters = list(model.parameters())
    found = gradients_of(prior(x, target=1), parameters)
    model.checkpoints = False
    assert relative_error(found, gradients_of(prior(x, target=1), parameters)) < 1e-12
