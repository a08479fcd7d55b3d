"""Expected gradients of layers: the same thing on the second half of the model."""

from typing import Any

import pytest
import torch
from captum.attr import LayerGradientShap, LayerIntegratedGradients
from torch import Tensor, nn

from captum_priors import ExpectedGradients, LayerExpectedGradients
from captum_priors.testing import check_differentiable
from tests.asserts import assert_same_numbers, leaves_no_trace, parameter_gradients, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, hidden_layer, mlp, tokens


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
    parameters = list(case.model.parameters())
    assert (
        relative_error(
            parameter_gradients(found, parameters), parameter_gradients(expected, parameters)
        )
        < 1e-12
    )


def test_layer_input_is_the_output_of_the_layer_before() -> None:
    case = hidden_layer()
    by_input = LayerExpectedGradients(case.model, case.model[2]).attribute(
        case.inputs,
        case.baselines,
        3,
        target=1,
        attribute_to_layer_input=True,
        generator=seeded(),
    )
    by_output = LayerExpectedGradients(case.model, case.model[1]).attribute(
        case.inputs, case.baselines, 3, target=1, generator=seeded()
    )
    # A layer receives its arguments as a tuple, of one.
    assert_same_numbers(by_input, by_output, 1e-12)


def test_first_layer_input_is_plain_expected_gradients() -> None:
    case = mlp()
    found = LayerExpectedGradients(case.model, case.model[0]).attribute(
        case.inputs,
        case.baselines,
        target=case.target,
        attribute_to_layer_input=True,
        generator=seeded(),
    )
    expected = ExpectedGradients(case.model).attribute(
        case.inputs, case.baselines, target=case.target, generator=seeded()
    )
    assert_same_numbers(found, expected, 1e-12)


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


@pytest.mark.parametrize("way", EXACT)
def test_arguments_with_an_entry_for_each_example(way: str) -> None:
    """Reference activations then depend on the example's own mask."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mix(x * mask)))

    model = Masked()
    x, background, mask = torch.randn(3, 4), torch.randn(6, 4), torch.rand(3, 4)
    explainer = LayerExpectedGradients(model, model.mix, differentiation=way)
    call = {"baselines": background, "target": 1, "additional_forward_args": mask}
    found, delta = explainer.attribute(x, n_samples=6, return_convergence_delta=True, **call)
    here = model(x, mask)[:, 1]
    there = torch.stack([model(background, m.expand(6, 4))[:, 1].mean() for m in mask])
    assert_same_numbers(found.sum(1), here - there + delta.reshape(3, 6).mean(1), 1e-10)
    assert check_differentiable(explainer, x, n_samples=3, **call).passed


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


def test_shared_and_unsuitable_layers_are_refused() -> None:
    shared = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    explainer = LayerExpectedGradients(lambda z: shared(shared(z)), shared)
    with pytest.raises(ValueError, match="found 2 runs"):
        explainer.attribute(x, x, target=0)
    with pytest.raises(ValueError, match="found 0 runs"):
        LayerExpectedGradients(nn.Linear(3, 2), shared).attribute(x, x, target=0)
    lstm = nn.LSTM(3, 2, batch_first=True)
    with pytest.raises(TypeError, match="attribute_to_layer_input"):
        LayerExpectedGradients(lambda z: lstm(z)[0][:, -1], lstm).attribute(
            torch.randn(2, 4, 3), torch.randn(2, 4, 3), target=0
        )
    with pytest.raises(TypeError, match=r"model\.some_layer"):
        LayerExpectedGradients(shared, "weight")
    embedding = nn.Embedding(5, 2)
    ids = torch.zeros(2, 3).long()
    with pytest.raises(TypeError, match="floating-point"):
        LayerExpectedGradients(lambda z: embedding(z).sum(1), embedding).attribute(
            ids, ids, target=0, attribute_to_layer_input=True
        )
