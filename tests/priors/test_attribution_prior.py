"""The attribution prior against computations by hand, and its behaviour at the edges."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Attribution, InputXGradient, Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    NotDifferentiableError,
    StabilityPrior,
    differentiable,
)
from captum_priors.distances import mse
from captum_priors.penalties import gini, l1, l2, outside
from captum_priors.priors import RightForTheRightReasons
from tests.asserts import assert_same_numbers, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, Case, cnn, mlp, relu_mlp, rows, tuple_inputs

# The same float64 operations in another order.
ROUNDING = 1e-12


def _gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(found, model.parameters(), strict=True)
    ]


def _input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, target: int) -> Tensor:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf, create_graph=True)
    return gradient


@pytest.mark.parametrize(("reduction", "weight"), [("mean", 1 / 5), ("sum", 1.0)])
def test_equals_a_computation_by_hand(reduction: Any, weight: float) -> None:
    case = mlp()
    attributions = case.inputs * _input_gradient(case.model, case.inputs, 1)
    expected = weight * attributions.abs().sum()
    value = AttributionPrior(InputXGradient(case.model), l1, reduction=reduction)(
        case.inputs, target=1
    )
    assert value.shape == ()
    assert_same_numbers(value, expected, ROUNDING)
    error = relative_error(_gradients(value, case.model), _gradients(expected, case.model))
    assert error < ROUNDING


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_penalty_of_the_batch_is_not_reduced(reduction: Any) -> None:
    case = mlp()
    expected = gini(_input_gradient(case.model, case.inputs, 2))
    prior = AttributionPrior(Saliency(case.model), gini, reduction=reduction)
    assert_same_numbers(prior(case.inputs, target=2), expected, ROUNDING)


def test_linear_model_has_the_closed_form() -> None:
    model, x, background = nn.Linear(4, 3), torch.randn(5, 4), torch.randn(7, 4)
    prior = AttributionPrior(ExpectedGradients(model), l2, baselines=background, n_samples=3)
    expected = (model.weight[1] * (x - background.mean(0))).square().sum(1).mean()
    value = prior(x, target=1)
    assert_same_numbers(value, expected, ROUNDING)
    assert relative_error(_gradients(value, model), _gradients(expected, model)) < ROUNDING


def test_baselines_of_the_call_come_before_those_of_the_constructor() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    prior = AttributionPrior(ExpectedGradients(model), l2, baselines=torch.zeros(1, 4))
    assert_same_numbers(prior(x, x[:1], target=0), prior(x, baselines=x[:1], target=0), ROUNDING)
    moved = (model.weight[0] * (x - x[0])).square().sum(1).mean()
    assert_same_numbers(prior(x, x[:1], target=0), moved, ROUNDING)
    assert_same_numbers(prior(x, target=0), (model.weight[0] * x).square().sum(1).mean(), ROUNDING)


def test_tuple_inputs_and_additional_arguments() -> None:
    case = tuple_inputs()
    leaves = tuple(t.clone().requires_grad_() for t in case.inputs)
    output = case.model(*leaves, *case.args)[:, 1]
    gradients = torch.autograd.grad(output.sum(), leaves, create_graph=True)
    expected = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0).mean()
    value = AttributionPrior(Saliency(case.model), l2)(
        case.inputs, target=1, additional_forward_args=case.args
    )
    assert_same_numbers(value, expected, ROUNDING)
    assert (
        relative_error(_gradients(value, case.model), _gradients(expected, case.model)) < ROUNDING
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_last_partial_batch_of_one_example(reduction: Any) -> None:
    case = cnn()
    prior = AttributionPrior(
        ExpectedGradients(case.model), l2, baselines=case.baselines, reduction=reduction
    )
    value = prior(case.inputs[:1], target=torch.tensor([2]))
    assert value.shape == ()
    assert sum(float(g.abs().sum()) for g in _gradients(value, case.model)) > 0


def test_annotations_reach_the_penalty() -> None:
    case = mlp()
    mask = torch.randint(2, case.inputs.shape)
    gradient = _input_gradient(case.model, case.inputs, 0)
    prior = AttributionPrior(Saliency(case.model), outside, abs=False)
    value = prior(case.inputs, target=0, annotation=mask)
    assert_same_numbers(value, ((1 - mask) * gradient).square().sum(1).mean(), ROUNDING)


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    case = mlp()
    prior = AttributionPrior(Saliency(case.model), l2)
    expected = _gradients(prior(case.inputs, target=0), case.model)
    case.model[0].requires_grad_(requires_grad=False)
    prior(case.inputs, target=0).backward()
    assert case.model[0].weight.grad is None
    for parameter, gradient in list(zip(case.model.parameters(), expected, strict=True))[2:]:
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_model_that_is_frozen_altogether_gives_a_value(way: Any) -> None:
    case = mlp()
    prior = AttributionPrior(differentiable(Saliency(case.model), differentiation=way), l2)
    expected = prior(case.inputs, target=0).item()
    case.model.requires_grad_(requires_grad=False)
    other = torch.ones((), requires_grad=True)
    (other.square() + prior(case.inputs, target=0)).backward()
    assert prior(case.inputs, target=0).item() == expected
    assert other.grad == 2
    assert [p.grad for p in case.model.parameters() if p.grad is not None] == []


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_gradient_reaches_the_module_upstream(way: Any) -> None:
    case, encoder = mlp(), nn.Linear(6, 4)
    raw = torch.randn(5, 6)
    leaf = encoder(raw)
    (gradient,) = torch.autograd.grad(case.model(leaf)[:, 1].sum(), leaf, create_graph=True)
    expected = _gradients((leaf * gradient).abs().sum(1).mean(), encoder)
    explainer = differentiable(InputXGradient(case.model), differentiation=way)
    value = AttributionPrior(explainer, l1)(encoder(raw), target=1)
    # Central differences over 1 % of the point: truncation is (1e-2)^2, times the curvature.
    tolerance = ROUNDING if way in EXACT else 1e-3
    assert relative_error(_gradients(value, encoder), expected) < tolerance


@pytest.mark.parametrize("make", rows([mlp, cnn, tuple_inputs]))
def test_differentiations_agree(make: Callable[[], Case]) -> None:
    case = make()
    found = {}
    for way in DIFFERENTIATIONS:
        explainer = ExpectedGradients(case.model, differentiation=way)
        prior = AttributionPrior(
            explainer,
            l2,
            baselines=case.baselines,
            n_samples=4,
            generator=torch.Generator().manual_seed(0),
        ).eval()
        found[way] = _gradients(prior(case.inputs, **case.call), case.model)
    assert relative_error(found["recompute"], found["double_backprop"]) < ROUNDING
    # Truncation as above; GELU and tanh have third derivatives of order 1.
    assert relative_error(found["finite_difference"], found["double_backprop"]) < 1e-3


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_smooth_runs_the_attribution_pass_with_softplus(way: Any) -> None:
    case, beta = relu_mlp(), 5.0
    smoothed = nn.Sequential(
        *(nn.Softplus(beta=beta) if isinstance(m, nn.ReLU) else m for m in case.model)
    )
    plain = differentiable(Saliency(case.model), differentiation=way)
    twin = differentiable(Saliency(smoothed), differentiation=way)
    value = AttributionPrior(plain, l2, smooth=beta)(case.inputs, target=2)
    expected = AttributionPrior(twin, l2)(case.inputs, target=2)
    assert_same_numbers(value, expected, ROUNDING)
    # The backward pass of the other two ways comes after the prior has put ReLU back.
    gradient = _gradients(value, case.model)
    assert relative_error(gradient, _gradients(expected, smoothed)) < ROUNDING
    rough = AttributionPrior(plain, l2)(case.inputs, target=2)
    assert abs(rough.item() / value.item() - 1) > 1e-3
    assert torch.equal(case.model(case.inputs), nn.Sequential(*case.model)(case.inputs))


def test_attribution_pass_holds_the_model_still() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 2)
    )
    x = torch.randn(5, 4)
    model(x)  # moves the statistics away from their initial values
    gradient = _input_gradient(model.eval(), x, 1)
    value = AttributionPrior(Saliency(model.train()), l2, batch_norm="running")(x, target=1)
    assert_same_numbers(value, gradient.square().sum(1).mean(), ROUNDING)


@pytest.mark.parametrize(
    "make",
    [
        lambda m, **options: AttributionPrior(Saliency(m), l2, **options),
        lambda m, **options: StabilityPrior(Saliency(m), mse, lambda x: x + 0.1, **options),
        RightForTheRightReasons,
    ],
)
def test_running_statistics_are_explained_where_asked_for(make: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.5), nn.Tanh())
    x = torch.randn(9, 4)
    for _ in range(9):
        model(x)  # close to those of the batch, whose variance is another by n / (n - 1)
    call: dict[str, Any] = {"target": 1}
    if make is RightForTheRightReasons:
        call["annotation"] = torch.zeros(9, 4)
    on_running, on_batch = make(model, batch_norm="running"), make(model)
    expected = on_running.eval()(x, **call)
    assert "batch_norm='running'" in repr(on_running)
    assert_same_numbers(on_running.train()(x, **call), expected, ROUNDING)
    assert abs(on_batch(x, **call).item() / expected.item() - 1) > 1e-3


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_value_without_gradients_is_detached(block: Any, way: Any) -> None:
    case = cnn()
    explainer = ExpectedGradients(case.model, differentiation=way)
    prior = AttributionPrior(explainer, l1, baselines=case.baselines).eval()
    expected = prior(case.inputs, target=1).item()
    with block():
        value = prior(case.inputs.clone(), target=torch.tensor([1, 1, 1]))
    assert not value.requires_grad
    # The same draws and operations.
    assert float(value) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_autocast(way: Any) -> None:
    model = cnn().model.float()
    x, background = torch.randn(3, 1, 8, 8).float(), torch.randn(6, 1, 8, 8).float()
    explainer = ExpectedGradients(model, differentiation=way)
    prior = AttributionPrior(explainer, l2, baselines=background, n_samples=4).eval()
    exact = prior(x, target=1)
    expected = _gradients(exact, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = prior(x, target=1)
    found = _gradients(value, model)
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in found)
    if way in EXACT:  # bfloat16 rounds at 2^-9 = 0.2 %, some ten times in a row
        assert value.item() != exact.item()
        assert value.item() == pytest.approx(exact.item(), rel=0.05)
        assert relative_error(found, expected) < 0.05
    else:  # evaluates in full precision
        assert value.item() == pytest.approx(exact.item(), rel=1e-6)
        assert relative_error(found, expected) < 1e-2


def test_input_dtype_is_the_dtype_of_the_value() -> None:
    model = nn.Linear(4, 3).float()
    prior = AttributionPrior(ExpectedGradients(model), l2)
    assert (
        prior(torch.randn(5, 4).float(), torch.zeros(1, 4).float(), target=0).dtype == torch.float32
    )


class Detaching:
    """Looks like an explainer and cuts the graph."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        with torch.enable_grad():
            return _input_gradient(self.model, inputs, target).detach()


def test_explainer_that_detaches_is_refused() -> None:
    case = mlp()
    prior = AttributionPrior(Detaching(case.model), l1)
    text = (
        r"`explainer`: expected attributions with a graph to the model's trainable parameters, "
        r"found none from Detaching\. Look for detach\(\)"
    )
    with pytest.raises(NotDifferentiableError, match=text):
        prior(case.inputs, target=1)
    with torch.no_grad():
        assert float(prior(case.inputs, target=1)) > 0


def _make(**options: Any) -> Any:
    return AttributionPrior(ExpectedGradients(nn.Linear(4, 3)), l1, **options)


def _three(attributions: Tensor) -> Tensor:
    return attributions.flatten()[:3]


BAD_PRIORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "uncertified",
        lambda: AttributionPrior(Attribution(nn.Linear(4, 3)), l1),
        NotDifferentiableError,
        r"`explainer`: expected one that can be trained on, found Attribution, an abstract",
    ),
    (
        "no-explainer",
        lambda: AttributionPrior(nn.Linear(4, 3), l1),
        TypeError,
        r"`explainer`: expected an object with Captum's attribute.*, found Linear\. Pass for",
    ),
    (
        "no-penalty",
        lambda: AttributionPrior(Saliency(nn.Linear(4, 3)), 0.1),
        TypeError,
        r"`penalty`: expected a function of attributions, found float\. Pass one of",
    ),
    (
        "reduction",
        lambda: _make(reduction="none"),
        ValueError,
        r"`reduction`: expected one of 'mean', 'sum', found 'none'\. Pass one",
    ),
    (
        "smooth",
        lambda: _make(smooth=0),
        ValueError,
        r"`smooth`: expected a positive finite number, found 0\. Pass for example smooth=30",
    ),
    (
        "option",
        lambda: _make(n_sample=3),
        TypeError,
        r"`n_sample`: expected an option of ExpectedGradients\.attribute \(baselines, "
        r"n_samples, .*\), found 'n_sample'\. Did you mean n_samples\?",
    ),
    (
        "target-at-construction",
        lambda: _make(target=3),
        TypeError,
        r"`target`: expected it when the prior is called, found it at construction\. Move it",
    ),
]


@pytest.mark.parametrize(
    ("make", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD_PRIORS]
)
def test_bad_configuration_gives_one_clear_error(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


_x = torch.ones(5, 4, dtype=torch.float64)

BAD_CALLS: list[tuple[str, Callable[[nn.Module], Any], type[Exception], str]] = [
    (
        "baselines-missing",
        lambda m: AttributionPrior(ExpectedGradients(m), l1)(_x, target=0),
        TypeError,
        r"`baselines`: expected the reference rows that ExpectedGradients averages over, found none"
        r"\. Pass baselines=",
    ),
    (
        "baselines-not-taken",
        lambda m: AttributionPrior(Saliency(m), l1)(_x, _x, target=0),
        TypeError,
        r"expected keywords that a term of it takes, found 'baselines'\. Leave it out",
    ),
    (
        "annotation-unknown",
        lambda m: AttributionPrior(Saliency(m), l1)(_x, target=0, annotation=_x),
        TypeError,
        r"prior AttributionPrior\(Saliency, l1\): expected keywords that a term of it takes, found "
        r"'annotation'\. Leave it out",
    ),
    (
        "annotation-of-a-builtin",
        lambda m: AttributionPrior(Saliency(m), torch.sum)(_x, target=0, annotation=_x),
        TypeError,
        r"expected keywords that a term of it takes, found 'annotation'",
    ),
    (
        "inputs-type",
        lambda m: AttributionPrior(Saliency(m), l1)([[1.0]], target=0),
        TypeError,
        r"`inputs`: expected a torch\.Tensor, found list\. Pass the tensor",
    ),
    (
        "inputs-empty",
        lambda m: AttributionPrior(Saliency(m), l1)(_x[:0], target=0),
        ValueError,
        r"`inputs`: expected a non-empty batch .*, found shape \(0, 4\)\. Skip",
    ),
    (
        "target-length",
        lambda m: AttributionPrior(Saliency(m), l1)(_x, target=[0, 1]),
        ValueError,
        r"`target`: expected one for each of the 5 examples, found 2\. Match",
    ),
    (
        "target-float",
        lambda m: AttributionPrior(Saliency(m), l1)(_x, target=torch.zeros(5)),
        TypeError,
        r"`target`: expected integer class indices, found torch\.float64\. For regression",
    ),
    (
        "penalty-shape",
        lambda m: AttributionPrior(Saliency(m), _three)(_x, target=0),
        ValueError,
        r"`penalty`: expected a tensor of shape \(5,\), or \(\) for the batch, found "
        r"\(3,\)\. Return",
    ),
    (
        "penalty-type",
        lambda m: AttributionPrior(Saliency(m), lambda a: 0.0)(_x, target=0),
        ValueError,
        r"`penalty`: expected a tensor of shape \(5,\), .*, found float",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD_CALLS]
)
def test_bad_call_gives_one_clear_error(
    call: Callable[[nn.Module], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call(mlp().model)
