"""Every admitted explainer meets every law, on every kind of model."""

import copy
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients

from captum_priors import AttributionPrior, differentiable
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.asserts import (
    as_tuple,
    assert_same_numbers,
    leaves_no_trace,
    parameter_gradients,
    relative_error,
)
from tests.cases import (
    DIFFERENTIATIONS,
    EXACT,
    EXPLAINERS,
    LAYER_EXPLAINERS,
    LAYER_MODELS,
    MODELS,
    NONLINEAR,
    Case,
    Row,
    rows,
)

PAIRS = [(row, model) for row in EXPLAINERS for model in NONLINEAR] + [
    (row, model) for row in LAYER_EXPLAINERS for model in LAYER_MODELS
]


def pairs(table: list[Any]) -> Any:
    """Parametrise a test over explainers and the models that they are made for."""
    named = [pytest.param(r, m, id=f"{r.name}-{m.__name__}") for r, m in table]
    return pytest.mark.parametrize(("row", "make_case"), named)


every_pair = pairs(PAIRS)


@every_pair
@pytest.mark.parametrize("way", EXACT)
def test_certificate(row: Row, make_case: Any, way: str) -> None:
    """Parameter gradients equal central differences."""
    case: Case = make_case()
    check_differentiable(row.make(case, way), case.inputs, **row.call(case))


@pytest.mark.parametrize("row", rows(EXPLAINERS))
@pytest.mark.parametrize("make_case", rows([m for m in NONLINEAR if "relu" not in m.__name__]))
def test_certificate_by_inputs(row: Row, make_case: Any) -> None:
    """Input gradients too: attacks and generators need them."""
    case: Case = make_case()
    inputs = tuple(x.requires_grad_() for x in as_tuple(case.inputs))
    inputs = inputs if isinstance(case.inputs, tuple) else inputs[0]
    for way in EXACT:
        certificate = check_differentiable(row.make(case, way), inputs, **row.call(case))
        assert any(name.startswith("inputs") for name in certificate.errors)


@pairs([(r, m) for r, m in PAIRS if m().smooth])
def test_finite_difference_agrees(row: Row, make_case: Any) -> None:
    """Within what a step of 1 % allows. It sees kinks that double backpropagation drops."""
    case: Case = make_case()
    gradients = []
    for way in ("double_backprop", "finite_difference"):
        torch.manual_seed(3)
        value = row.make(case, way).attribute(case.inputs, **row.call(case))
        gradients.append(parameter_gradients(value, list(case.model.parameters())))
    # Second-order truncation error of a 0.2 % step: 1e-4 times the third derivative's size.
    assert relative_error(gradients[1], gradients[0]) < 5e-3


@every_pair
def test_differentiations_share_their_values(row: Row, make_case: Any) -> None:
    case: Case = make_case()
    values = []
    for way in DIFFERENTIATIONS:
        torch.manual_seed(3)
        case.model.eval()
        values.append(row.make(case, way).attribute(case.inputs, **row.call(case)))
    # Chunks add up in another order.
    assert_same_numbers(values[1], values[0], 1e-12)
    assert_same_numbers(values[2], values[0], 1e-12)


@every_pair
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_no_gradient_recorded_no_graph(row: Row, make_case: Any, way: str) -> None:
    case: Case = make_case()
    explainer, call = row.make(case, way), row.call(case)
    torch.manual_seed(3)
    expected = explainer.attribute(case.inputs, **call)
    for context in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(3)
        with context():
            found = explainer.attribute(case.inputs, **call)
        assert not any(t.requires_grad for t in as_tuple(found))
        assert_same_numbers(found, expected, 1e-12)


@pytest.mark.parametrize("row", [r for r in rows(EXPLAINERS) if r.values[0].stock])
@pytest.mark.parametrize("make_case", rows(MODELS))
def test_same_numbers_as_captum(row: Row, make_case: Any) -> None:
    case: Case = make_case()
    assert row.stock is not None
    expected = row.stock(case).attribute(case.inputs, **row.call(case))
    for way in DIFFERENTIATIONS:
        found = row.make(case, way).attribute(case.inputs, **row.call(case))
        assert_same_numbers(found, expected)


@every_pair
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_prior_leaves_no_trace(row: Row, make_case: Any, way: str) -> None:
    """Train mode, gradients present; also through the backward pass, except for ``.grad``."""
    case: Case = make_case()
    if way == "finite_difference" and make_case.__name__.startswith("relu"):
        pytest.skip("differences are of smooth functions, and refuse kinks")
    case.model.train()
    for p in case.model.parameters():
        p.grad = torch.randn_like(p)
    options = {k: v for k, v in row.call(case).items() if k not in case.call}
    prior = AttributionPrior(row.make(case, way), l2, **options)
    with leaves_no_trace(case.model, tensors=as_tuple(case.inputs)):
        value = prior(case.inputs, **case.call)
        parameter_gradients(value, list(case.model.parameters()))


@pytest.mark.parametrize("row", rows(EXPLAINERS))
def test_frozen_parameters_get_no_gradient(row: Row) -> None:
    case = NONLINEAR[0]()
    frozen, *rest = case.model.parameters()
    everything = copy.deepcopy(case.model)
    frozen.requires_grad_(False)
    for way in EXACT:
        torch.manual_seed(3)
        value = row.make(case, way).attribute(case.inputs, **row.call(case))
        found = parameter_gradients(value, rest)
        torch.manual_seed(3)
        twin = Case(everything, case.inputs, case.baselines, case.target)
        value = row.make(twin, way).attribute(case.inputs, **row.call(case))
        expected = parameter_gradients(value, list(everything.parameters())[1:])
        assert relative_error(found, expected) < 1e-12  # same graph, rounding apart


def test_certificate_fails_for_known_wrong_routes() -> None:
    """Integrated gradients in internal batches through a naive graph-keeping gradient function."""
    case = NONLINEAR[0]()

    def keep_graph(
        forward_fn: Any, inputs: Any, target_ind: Any = None, additional_forward_args: Any = None
    ) -> Any:
        outputs = forward_fn(*inputs)
        chosen = outputs.gather(1, torch.as_tensor(target_ind).reshape(-1, 1))
        return torch.autograd.grad(chosen.sum(), inputs, create_graph=True)

    naive = IntegratedGradients(case.model)
    naive.gradient_func = keep_graph
    call = {"target": case.target, "n_steps": 8}
    assert check_differentiable(naive, case.inputs, **call).passed
    wrong = check_differentiable(
        naive, case.inputs, **call, internal_batch_size=10, raise_exception=False
    )
    assert wrong.error > 0.1
    right = differentiable(IntegratedGradients(case.model))
    assert check_differentiable(right, case.inputs, **call, internal_batch_size=10).passed
