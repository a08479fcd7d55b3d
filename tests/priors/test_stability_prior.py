"""The stability prior against computations by hand."""

from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients, StabilityPrior, differentiable
from captum_priors.attacks import DistanceAttack, ManipulationAttack, RandomAttack, TopKAttack
from captum_priors.distances import cosine, mse
from tests.asserts import assert_is, assert_same_numbers, input_gradient, leaves_no_trace
from tests.cases import mlp, relu_mlp, tuple_inputs

# The same float64 operations in another order.
ROUNDING = 1e-12


@pytest.mark.parametrize("distance", [mse, cosine])
@pytest.mark.parametrize(
    "perturbation",
    [lambda x: x + 0.3, torch.round, nn.Hardtanh(-0.5, 0.5)],
    ids=["function", "builtin", "module"],
)
def test_equals_a_computation_by_hand(perturbation: Any, distance: Any) -> None:
    """Gradients flow through both sides."""
    model, x = mlp().model, mlp().inputs
    sides = (input_gradient(model, at, 1) for at in (x, perturbation(x)))
    value = StabilityPrior(Saliency(model), distance, perturbation, abs=False)(x, target=1)
    assert_is(value, distance(*sides).mean(), model, ROUNDING)


@pytest.mark.parametrize("generator", [None, 1])
def test_both_sides_draw_the_same_from_a_generator_that_moves_on(generator: Any) -> None:
    case, options = mlp(), {"baselines": mlp().baselines, "n_samples": 2}
    if generator:
        options["generator"] = generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
    explainer = ExpectedGradients(case.model)
    prior = StabilityPrior(explainer, mse, lambda x: x.clone(), **options)
    # Without noise in the inputs nothing but the sampling could differ.
    assert prior(case.inputs, target=1).item() == 0
    assert generator is None or not torch.equal(generator.get_state(), before)


def test_perturbation_draws_anew_at_each_step() -> None:
    case, seen = mlp(), []

    def noise(x: Tensor) -> Tensor:
        seen.append(x + 0.1 * torch.randn_like(x))
        return seen[-1]

    prior = StabilityPrior(Saliency(case.model), mse, noise)
    for _ in range(2):
        prior(case.inputs, target=1)
    assert not torch.equal(seen[0], seen[1])


def test_what_a_perturbation_adds_is_constant() -> None:
    case, scale = mlp(), torch.full((), 0.3, requires_grad=True)
    x, explainer = case.inputs.clone().requires_grad_(), differentiable(InputXGradient(case.model))
    prior = StabilityPrior(explainer, mse, lambda x: x + scale)
    here, there = (explainer.attribute(at, target=1) for at in (x, x + 0.3))
    (found,) = torch.autograd.grad(prior(x, target=1), x)
    (expected,) = torch.autograd.grad(mse(here, there).mean(), x)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(prior(x, target=1), scale)


def test_perturbations_are_given_what_they_take() -> None:
    """Baselines of the call before those of the explainer, and what the model is given."""
    case, seen = tuple_inputs(), []

    class Moves:  # as captum.robust's perturbations do
        def perturb(
            self, inputs: Any, target: Any, additional_forward_args: Any, baselines: Any = None
        ) -> Any:
            seen.append((target, additional_forward_args, baselines))
            return tuple(x + 0.1 for x in inputs)

    explainer = differentiable(IntegratedGradients(case.model))
    own, rows = (tuple(b[i : i + 1] for b in case.baselines) for i in (0, 1))
    prior = StabilityPrior(explainer, mse, Moves(), baselines=own)
    prior(case.inputs, **case.call)
    value = prior(case.inputs, rows, **case.call)
    for found, baselines in zip(seen, (own, rows), strict=True):
        assert all(a is b for a, b in zip(found, (1, case.args, baselines), strict=True))
    here, there = (
        explainer.attribute(at, rows, **case.call)
        for at in (case.inputs, Moves().perturb(case.inputs, 1, None))
    )
    assert_same_numbers(value, mse(here, there).mean(), ROUNDING)


ATTACKS: dict[str, Any] = {
    "random": lambda explainer: RandomAttack(explainer, radius=0.3),
    "anywhere": lambda _: RandomAttack(radius=0.3, keep_prediction=False),
    "distance": lambda explainer: DistanceAttack(explainer, mse, radius=0.3, step_num=3),
    "top-k": lambda explainer: TopKAttack(explainer, 2, radius=0.3, step_num=3),
    "manipulation": lambda explainer: ManipulationAttack(explainer, radius=0.3, step_num=3),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


@every_attack
@pytest.mark.parametrize("smooth", [None, 5.0])
def test_attack_is_a_perturbation_through_which_no_gradient_flows(
    attack: Any, smooth: float | None
) -> None:
    model, x, seen = relu_mlp().model, relu_mlp().inputs, []
    attack = attack(Saliency(model))

    def record(x: Tensor, target: Any) -> Tensor:
        seen.append(attack.perturb(x, target=target))
        return seen[-1]

    value, expected = (
        StabilityPrior(Saliency(model), mse, moved, smooth=smooth)(x, target=1)
        for moved in (record, lambda x: seen[0])
    )
    assert not seen[0].requires_grad
    assert not torch.equal(seen[0], x)
    assert value.item() > 0
    assert_is(value, expected, model, ROUNDING)


@pytest.mark.filterwarnings("ignore:A batch of one example has no statistics")
@every_attack
def test_attack_leaves_no_trace_in_training_and_takes_any_batch(attack: Any) -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)
    )
    x = torch.randn(9, 4)
    model(x).square().sum().backward()
    prior = StabilityPrior(Saliency(model), mse, attack(Saliency(model)), smooth=10)
    for batch in x.split(4):  # the last has one example
        with leaves_no_trace(model, tensors=[x]):
            value = prior(batch, target=1)
        assert value.isfinite()
        value.backward()
    assert len({prior(x, target=1).item() for _ in range(2)}) == 2  # it draws anew at each step
