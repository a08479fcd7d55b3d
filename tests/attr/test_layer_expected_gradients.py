"""Expected gradients of layers: the same thing on the second half of the model."""

from typing import Any

import pytest
import torch
from captum.attr import LayerGradientShap, LayerIntegratedGradients
from torch import Tensor, nn

from captum_priors import ExpectedGradients, LayerExpectedGradients
from tests.asserts import assert_same_numbers, leaves_no_trace, parameter_gradients, relative_error
from tests.cases import DIFFERENTIATIONS, hidden_layer, mlp, tokens


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("estimator", ["monte_carlo", "control_variate"])
def test_equals_expected_gradients_of_the_rest_of_the_model(estimator: Any) -> None:
    case = hidden_layer()
    first, rest = case.model[:2], case.model[2:]
    found = LayerExpectedGradients(case.model, case.layer).attribute(
        case.inputs, case.baselines, 4, target=1, estimator=estimator, generator=seeded()
    )
    expected = ExpectedGradients(rest).attribute(
        first(case.inputs),
        first(case.baselines),
        4,
        target=1,
        estimator=estimator,
        generator=seeded(),
    )
    assert_same_numbers(found, expected, 1e-12)  # the layer runs on other batches
    slopes = [parameter_gradients(maps, [*case.model.parameters()]) for maps in (found, expected)]
    assert relative_error(*slopes) < 1e-12


def test_layer_input_is_the_output_of_the_layer_before_or_the_inputs() -> None:
    case = mlp()
    options = {"n_samples": 3, "target": case.target}

    def attribute(explainer: Any, **more: Any) -> Tensor:
        data = (case.inputs, case.baselines)
        return explainer.attribute(*data, generator=seeded(), **options, **more)

    for i in (2, 0):
        by_input = attribute(
            LayerExpectedGradients(case.model, case.model[i]), attribute_to_layer_input=True
        )
        expected = attribute(
            LayerExpectedGradients(case.model, case.model[1])
            if i
            else ExpectedGradients(case.model)
        )
        # A layer receives its arguments as a tuple, of one.
        assert_same_numbers(by_input, expected, 1e-12)


def test_one_baseline_is_layer_integrated_gradients() -> None:
    case = tokens()
    stock = LayerIntegratedGradients(case.model, case.layer).attribute(
        case.inputs, baselines=case.baselines[:1], target=2, n_steps=60
    )
    found = LayerExpectedGradients(case.model, case.layer).attribute(
        case.inputs, case.baselines[:1], 400, target=2
    )
    assert_same_numbers(found.detach(), stock, 1e-3)  # one random position in each 400th


def test_completeness_on_token_ids() -> None:
    case = tokens()
    n = 2 * len(case.baselines)
    found, delta = LayerExpectedGradients(case.model, case.layer).attribute(
        case.inputs, case.baselines, n, target=2, return_convergence_delta=True
    )
    gap = case.model(case.inputs)[:, 2] - case.model(case.baselines)[:, 2].mean()
    assert_same_numbers(found.sum((1, 2)), gap + delta.reshape(3, n).mean(1), 1e-10)


def test_takes_layer_gradient_shap_calls() -> None:
    case = hidden_layer()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((case.inputs, case.baselines), {"target": 1}),
        ((case.inputs, case.baselines, 3, 0.1, 1, None, True), {}),
        ((case.inputs, lambda: case.baselines, 2, 0.0, 1, None, False, True), {}),
    ]
    for args, named in calls:
        stock = LayerGradientShap(case.model, case.layer).attribute(*args, **named)
        ours = LayerExpectedGradients(case.model, case.layer).attribute(*args, **named)
        for a, b in zip(_flat(ours), _flat(stock), strict=True):
            assert a.shape == b.shape


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in _flat(v)]


def test_references_run_with_the_arguments_of_their_example() -> None:
    """Of a linear model, over all rows: w * (h(x) - mean h(x')), both under the same mask."""
    mix, head = nn.Linear(4, 4), nn.Linear(4, 1)
    x, background, mask = torch.randn(3, 4), torch.randn(6, 4), torch.rand(3, 4)
    found = LayerExpectedGradients(lambda x, mask: head(mix(x * mask)), mix).attribute(
        x, background, 6, target=0, additional_forward_args=mask
    )
    there = torch.stack([mix(background * m).mean(0) for m in mask])
    assert_same_numbers(found, head.weight * (mix(x * mask) - there), 1e-12)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_hooks_are_gone_also_after_an_error(way: str) -> None:
    case = tokens()
    explainer = LayerExpectedGradients(case.model, case.layer, differentiation=way)
    with leaves_no_trace(case.model):
        explainer.attribute(case.inputs, case.baselines, target=2, generator=seeded())
    case.model.head.forward = lambda x: x @ torch.zeros(99, 1)
    with leaves_no_trace(case.model), pytest.raises(RuntimeError, match="shape"):
        explainer.attribute(case.inputs, case.baselines, target=2, generator=seeded())


def test_unsuitable_layers_are_refused() -> None:
    x, elsewhere = torch.randn(2, 3), nn.Linear(3, 3)
    with pytest.raises(ValueError, match="found 0 runs"):
        LayerExpectedGradients(nn.Linear(3, 2), elsewhere).attribute(x, x, target=0)
    lstm = nn.LSTM(3, 2, batch_first=True)
    with pytest.raises(TypeError, match="attribute_to_layer_input"):
        LayerExpectedGradients(lambda z: lstm(z)[0][:, -1], lstm).attribute(
            torch.randn(2, 4, 3), torch.randn(2, 4, 3), target=0
        )
    embedding = nn.Embedding(5, 2)
    ids = torch.zeros(2, 3).long()
    with pytest.raises(TypeError, match="floating-point"):
        LayerExpectedGradients(lambda z: embedding(z).sum(1), embedding).attribute(
            ids, ids, target=0, attribute_to_layer_input=True
        )
