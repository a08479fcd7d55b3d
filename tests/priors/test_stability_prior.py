"""The stability prior against computations by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, Saliency
from captum.robust import FGSM
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, StabilityPrior, differentiable
from captum_priors.attacks import DistanceAttack, ManipulationAttack, RandomAttack, TopKAttack
from captum_priors.distances import SoftTopK, cosine, mse
from captum_priors.penalties import l2
from tests.asserts import assert_same_numbers, leaves_no_trace, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, cnn, mlp, relu_mlp, tuple_inputs

# The same float64 operations in another order.
ROUNDING = 1e-12


def _move(x: Tensor) -> Tensor:
    return x + 0.3


def _noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


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


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize(("reduction", "weight"), [("mean", 1 / 5), ("sum", 1.0)])
def test_equals_a_computation_by_hand(way: Any, reduction: Any, weight: float) -> None:
    case = mlp()
    here = _input_gradient(case.model, case.inputs, 1)
    there = _input_gradient(case.model, case.inputs + 0.3, 1)
    expected = weight * (here - there).square().mean(1).sum()
    explainer = differentiable(Saliency(case.model), differentiation=way)
    prior = StabilityPrior(explainer, mse, _move, reduction=reduction, abs=False)
    value = prior(case.inputs, target=1)
    assert value.shape == ()
    assert_same_numbers(value, expected, ROUNDING)
    # Gradients flow through both sides; central differences over 1 % of the point err by 1e-4
    # of each, of which the difference keeps a larger share.
    tolerance = ROUNDING if way in EXACT else 1e-2
    assert (
        relative_error(_gradients(value, case.model), _gradients(expected, case.model)) < tolerance
    )


def test_both_sides_draw_the_same_random_numbers() -> None:
    case = mlp()
    explainer = ExpectedGradients(case.model)
    prior = StabilityPrior(
        explainer, mse, lambda x: x.clone(), baselines=case.baselines, n_samples=2
    )
    # Without noise in the inputs nothing but the sampling could differ.
    assert prior(case.inputs, target=1).item() == 0


def test_both_sides_draw_the_same_from_a_generator_that_moves_on() -> None:
    case = mlp()
    generator = torch.Generator().manual_seed(1)
    prior = StabilityPrior(
        ExpectedGradients(case.model),
        mse,
        lambda x: x.clone(),
        baselines=case.baselines,
        generator=generator,
    )
    before = generator.get_state()
    assert prior(case.inputs, target=1).item() == 0
    assert not torch.equal(generator.get_state(), before)


def test_perturbation_draws_anew_at_each_step() -> None:
    case, seen = mlp(), []

    def noise(x: Tensor) -> Tensor:
        seen.append(_noise(x))
        return seen[-1]

    prior = StabilityPrior(Saliency(case.model), mse, noise)
    for _ in range(2):
        prior(case.inputs, target=1)
    assert not torch.equal(seen[0], seen[1])


def test_what_a_perturbation_adds_is_constant() -> None:
    case, scale = mlp(), torch.full((), 0.3, requires_grad=True)
    x = case.inputs.clone().requires_grad_()
    prior = StabilityPrior(InputXGradient(case.model), mse, lambda x: x + scale)
    fixed = x + 0.3
    (found,) = torch.autograd.grad(prior(x, target=1), x)
    other = InputXGradient(case.model)
    there = differentiable(other).attribute(fixed, target=1)
    expected_value = mse(differentiable(other).attribute(x, target=1), there).mean()
    (expected,) = torch.autograd.grad(expected_value, x)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(prior(x, target=1), scale)


def test_captum_perturbation_is_given_the_target() -> None:
    case = mlp()
    attack = FGSM(case.model)
    moved = attack.perturb(case.inputs, epsilon=0.1, target=case.target)
    here, there = (
        differentiable(Saliency(case.model)).attribute(x, target=case.target)
        for x in (case.inputs, moved)
    )

    class Fixed(FGSM):
        def perturb(self, inputs: Any, target: Any = None) -> Any:
            return super().perturb(inputs, epsilon=0.1, target=target)

    value = StabilityPrior(Saliency(case.model), cosine, Fixed(case.model))(
        case.inputs, target=case.target
    )
    assert_same_numbers(value, cosine(here, there).mean(), ROUNDING)


def test_function_is_given_the_additional_arguments_that_it_takes() -> None:
    case, seen = tuple_inputs(), []

    def move(inputs: Any, additional_forward_args: Any) -> Any:
        seen.append(additional_forward_args)
        return tuple(x + 0.1 for x in inputs)

    prior = StabilityPrior(Saliency(case.model), mse, move)
    prior(case.inputs, target=1, additional_forward_args=case.args)
    assert len(seen) == 1
    assert seen[0] is case.args


def test_baselines_of_the_call_reach_the_perturbation_as_the_explainer() -> None:
    case, seen = mlp(), []

    def move(inputs: Tensor, baselines: Tensor) -> Tensor:
        seen.append(baselines)
        return inputs + 0.1

    explainer, rows = ExpectedGradients(case.model), case.baselines[:1]
    prior = StabilityPrior(explainer, mse, move, baselines=case.baselines)
    prior(case.inputs, target=1)
    prior(case.inputs, rows, target=1)
    assert seen[0] is case.baselines
    assert seen[1] is rows


@pytest.mark.parametrize("perturbation", [torch.round, nn.Hardtanh(-0.5, 0.5)])
def test_builtin_functions_and_modules_are_perturbations(perturbation: Any) -> None:
    case = mlp()
    here, there = (
        differentiable(Saliency(case.model)).attribute(x, target=1)
        for x in (case.inputs, perturbation(case.inputs))
    )
    value = StabilityPrior(Saliency(case.model), mse, perturbation)(case.inputs, target=1)
    assert_same_numbers(value, mse(here, there).mean(), ROUNDING)


def test_tuple_inputs() -> None:
    case = tuple_inputs()

    def move(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x + 0.1 for x in inputs)

    explainer = differentiable(Saliency(case.model))
    here, there = (explainer.attribute(x, **case.call) for x in (case.inputs, move(case.inputs)))
    value = StabilityPrior(explainer, mse, move)(case.inputs, **case.call)
    assert_same_numbers(value, mse(here, there).mean(), ROUNDING)


def test_linear_model_is_stable() -> None:
    prior = StabilityPrior(Saliency(nn.Linear(4, 3)), mse, _noise)
    assert prior(torch.randn(5, 4), target=1).item() == 0


@pytest.mark.parametrize("distance", [mse, cosine, SoftTopK(2)])
def test_one_example_trains(distance: Any) -> None:
    case = cnn()
    prior = StabilityPrior(Saliency(case.model), distance, _noise)
    value = prior(case.inputs[:1], target=1)
    assert value.item() > 0
    assert sum(g.abs().sum().item() for g in _gradients(value, case.model)) > 0


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_smooth_runs_both_passes_with_softplus(way: Any) -> None:
    case, beta = relu_mlp(), 5.0
    smoothed = nn.Sequential(
        *(nn.Softplus(beta=beta) if isinstance(m, nn.ReLU) else m for m in case.model)
    )
    value, expected = (
        StabilityPrior(differentiable(Saliency(m), differentiation=way), mse, _move, smooth=smooth)(
            case.inputs, target=2
        )
        for m, smooth in ((case.model, beta), (smoothed, None))
    )
    assert_same_numbers(value, expected, ROUNDING)
    error = relative_error(_gradients(value, case.model), _gradients(expected, smoothed))
    # The two forms of Softplus round alike; a difference of nearly equal maps loses digits.
    assert error < 1e-10


def test_formula_names_explainer_distance_and_perturbation() -> None:
    model = nn.Linear(4, 3)
    prior = StabilityPrior(Saliency(model), SoftTopK(2), _noise, abs=False)
    assert repr(prior) == (
        "StabilityPrior(Saliency, SoftTopK(k=2, temperature=0.1), _noise, abs=False)"
    )
    assert prior.distance is prior.score


BAD: list[tuple[str, Callable[[nn.Module], Any], type[Exception], str]] = [
    (
        "distance",
        lambda m: StabilityPrior(Saliency(m), "mse", _noise),
        TypeError,
        r"`distance`: expected a function of attributions, found str\. Pass one of "
        r"captum_priors\.distances",
    ),
    (
        "perturbation",
        lambda m: StabilityPrior(Saliency(m), mse, 0.1),
        TypeError,
        r"`perturbation`: expected a captum\.robust\.Perturbation or a function of the inputs, "
        r"found float\. Pass for",
    ),
    (
        "perturbed-shape",
        lambda m: StabilityPrior(Saliency(m), mse, lambda x: x[:2])(torch.ones(5, 4), target=0),
        ValueError,
        r"`perturbation`: expected perturbed inputs of shape, .* \[\(\(5, 4\), .*, found "
        r"\[\(\(2, 4\), .*\. Return",
    ),
    (
        "penalty-for-distance",
        lambda m: AttributionPrior(Saliency(m), l2, nonsense=1),
        TypeError,
        r"an option of .*Saliency\.attribute \(abs\), found 'nonsense'\. Check the spelling",
    ),
    (
        "distance-shape",
        lambda m: StabilityPrior(Saliency(m), lambda a, b: a - b, _noise)(
            torch.ones(5, 4), target=0
        ),
        ValueError,
        r"`distance`: expected a tensor of shape \(5,\), or \(\) for the batch, found \(5, 4\)",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD]
)
def test_bad_input_gives_one_clear_error(
    call: Callable[[nn.Module], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call(mlp().model)


def _attacks(model: nn.Module) -> list[Any]:
    explainer = Saliency(model)
    return [
        RandomAttack(explainer, radius=0.3),
        RandomAttack(radius=0.3, keep_prediction=False),
        DistanceAttack(explainer, mse, radius=0.3, step_num=3),
        TopKAttack(explainer, 2, radius=0.3, step_num=3),
        ManipulationAttack(explainer, radius=0.3, step_num=3),
    ]


@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("smooth", [None, 5.0])
def test_attack_is_a_perturbation_through_which_no_gradient_flows(
    i: int, smooth: float | None
) -> None:
    case = relu_mlp()
    attack, seen = _attacks(case.model)[i], []

    def record(x: Tensor, target: Any) -> Tensor:
        seen.append(attack.perturb(x, target=target))
        return seen[-1]

    prior = StabilityPrior(Saliency(case.model), mse, record, smooth=smooth)
    value = prior(case.inputs, target=1)
    fixed = seen[0]
    assert not fixed.requires_grad
    assert not torch.equal(fixed, case.inputs)
    expected = StabilityPrior(Saliency(case.model), mse, lambda x: fixed, smooth=smooth)(
        case.inputs, target=1
    )
    assert value.item() > 0
    assert_same_numbers(value, expected, ROUNDING)
    assert (
        relative_error(_gradients(value, case.model), _gradients(expected, case.model)) < ROUNDING
    )


@pytest.mark.filterwarnings("ignore:A batch of one example has no statistics")
@pytest.mark.parametrize("i", range(5))
def test_attack_leaves_no_trace_in_training_and_takes_any_batch(i: int) -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)
    )
    x = torch.randn(9, 4)
    model(x).square().sum().backward()
    prior = StabilityPrior(Saliency(model), mse, _attacks(model)[i], smooth=10)
    for batch in x.split(4):  # the last has one example
        with leaves_no_trace(model, tensors=[x]):
            value = prior(batch, target=1)
        assert value.isfinite()
        value.backward()


@pytest.mark.parametrize("i", range(5))
def test_attack_draws_anew_at_each_step(i: int) -> None:
    case = relu_mlp()
    prior = StabilityPrior(Saliency(case.model), mse, _attacks(case.model)[i])
    assert prior(case.inputs, target=1).item() != prior(case.inputs, target=1).item()
    assert prior.eval()(case.inputs, target=1).item() == prior(case.inputs, target=1).item()


def test_attack_is_given_the_baselines() -> None:
    case = mlp()
    explainer = ExpectedGradients(case.model)
    attack = DistanceAttack(explainer, mse, radius=0.3, step_num=2)
    value = StabilityPrior(explainer, mse, attack)(case.inputs, baselines=case.baselines, target=1)
    assert value.item() > 0


def test_adversarial_stability_is_above_random_stability() -> None:
    case = cnn()
    explainer = Saliency(case.model)
    attacks = [
        RandomAttack(explainer, radius=0.3, keep_prediction=False),
        DistanceAttack(explainer, mse, radius=0.3, step_num=10, keep_prediction=False),
    ]
    noise, attacked = (
        StabilityPrior(explainer, mse, a)(case.inputs, target=1).item() for a in attacks
    )
    assert attacked > 2 * noise
