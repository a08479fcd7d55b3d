"""Every admitted SHAP class: its own numbers, the certificate, no trace; one row each."""

from typing import Any

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    NotDifferentiableError,
    ShapAdapter,
    StabilityPrior,
    differentiable,
    shared,
)
from captum_priors.adapters.shap import ROWS
from captum_priors.distances import mse
from captum_priors.outputs import each, total, weighted
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.adapters.shap_cases import (
    PAIRS,
    QUICK,
    adapted,
    data,
    fails_in_shap,
    model_for,
    predictor,
    stock,
    table,
)
from tests.asserts import leaves_no_trace, parameter_gradients, relative_error

every_row = pytest.mark.parametrize("name", list(ROWS))
every_pair = pytest.mark.parametrize(("name", "outputs"), PAIRS)


def seeded(call: Any) -> Any:
    np.random.seed(3)  # noqa: NPY002  # SHAP's generator
    return call()


def set_up(name: str, outputs: int = 1) -> tuple[nn.Module, Any, Any, np.ndarray]:
    model = model_for(name, outputs).eval()
    explainer = stock(name, model)
    return model, explainer, adapted(name, explainer, model), table(3, 1)


@every_pair
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_numbers_of_shap(name: str, outputs: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.set_default_dtype(dtype)  # stock GradientExplainer computes in the default
    model = model_for(name, outputs).eval()
    background, x = table(7, 0), table(3, 1)
    if dtype == torch.float32:
        background, x = background.astype(np.float32), x.astype(np.float32)
    explainer = stock(name, model, background)
    adapter = adapted(name, explainer, model)
    X = data(name, x, model)
    found = seeded(lambda: adapter(X))
    assert np.abs(found.values - found.tensor.detach().numpy()).max() < 1e-10
    assert np.abs(found.base_values - found.tensor_base.detach().numpy()).max() < 1e-10
    if not fails_in_shap(name, outputs):
        expected = seeded(lambda: explainer(data(name, x, model)))
        values = np.asarray(expected.values)
        assert values.size == found.values.size
        if name not in ("GradientExplainer", "DeepExplainer"):  # theirs keep an axis of one output
            assert values.shape == found.values.shape
        assert np.abs(values.reshape(found.values.shape) - found.values).max() < tolerance
        if expected.base_values is not None:
            if name != "SamplingExplainer":  # SHAP gives one for all rows, which no plot takes
                assert np.shape(expected.base_values) == np.shape(found.base_values)
            assert np.abs(expected.base_values - found.base_values).max() < tolerance
    if hasattr(explainer, "shap_values"):
        expected = seeded(lambda: explainer.shap_values(data(name, x, model)))
        again = seeded(lambda: adapter.shap_values(X))
        assert type(again) is type(expected)
        assert again.shape == expected.shape
        assert np.abs(again - expected).max() < tolerance


@every_pair
def test_certificate(name: str, outputs: int) -> None:
    model, _, adapter, x = set_up(name, outputs)
    targets: list[Any] = [None] if outputs == 1 else [1, torch.tensor([2, 0, 1])]
    parameters = list(model.named_parameters())
    for way in ROWS[name].differentiations:
        if way == "finite_difference":  # exact ways alone can meet 1e-6
            continue
        adapter = differentiable(adapter, differentiation=way)
        for target in targets:
            check_differentiable(
                adapter,
                torch.as_tensor(x),
                target=target,
                parameters=parameters,
                **QUICK.get(name, {}),
            )


@every_pair
def test_base_value_is_that_of_the_model_now(name: str, outputs: int) -> None:
    """After a step of training: what a freshly made explainer says, not what was stored."""
    model, _, adapter, x = set_up(name, outputs)
    before = np.array(adapter.expected_value)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    fresh = adapted(name, stock(name, model), model)
    X = data(name, x, model)
    found, expected = seeded(lambda: adapter(X)), seeded(lambda: fresh(X))
    assert np.abs(found.values - expected.values).max() < 1e-10
    assert np.abs(found.base_values - expected.base_values).max() < 1e-10
    assert np.abs(adapter.expected_value - fresh.expected_value).max() < 1e-10
    assert np.abs(adapter.expected_value - before).max() > 1e-3
    outputs_now = predictor(model)(x)
    total = found.values.sum(1) + found.base_values
    if name != "GradientExplainer":  # additive in expectation only
        assert np.abs(total - outputs_now).max() < 1e-5  # SamplingExplainer's ridge: 1e-6


class Unsettled(nn.Module):
    """What an explanation could disturb."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.dropout = nn.BatchNorm1d(5), inner, nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.dropout(self.norm(x)))


@every_row
@pytest.mark.parametrize("stability", [False, True])
def test_priors_leave_no_trace(name: str, stability: bool) -> None:
    """Train mode, gradients present; NumPy's stream and the training flags stay."""
    inner = model_for(name, 1)
    model = inner if name == "LinearExplainer" else Unsettled(inner).eval()
    adapter = adapted(name, stock(name, model), model)
    model.train()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    x = torch.as_tensor(table(2, 1))
    prior: Any = AttributionPrior(adapter, l2)
    if stability:
        prior = StabilityPrior(adapter, mse, lambda x: x + 0.1 * torch.randn_like(x))
    with leaves_no_trace(model, tensors=[x]):
        value = prior(x)
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    assert any(g is not None and float(g.abs().max()) > 0 for g in gradients)
    model.eval()  # asked directly, it explains the model as it is
    with leaves_no_trace(model, tensors=[x]):
        _ = adapter.expected_value
        if name in ("GradientExplainer", "DeepExplainer"):  # the others draw from NumPy's stream
            adapter.shap_values(x, **({"rseed": 0} if name == "GradientExplainer" else {}))


@every_row
def test_stability_uses_the_same_draws_on_both_sides(name: str) -> None:
    _, _, adapter, x = set_up(name)
    prior = StabilityPrior(adapter, mse, lambda x: x.clone())
    assert float(prior(torch.as_tensor(x)).detach()) < 1e-20


@every_row
def test_single_precision_single_row_and_no_gradient(name: str) -> None:
    model = model_for(name, 1).float().eval()
    adapter = adapted(name, stock(name, model, table(7, 0).astype(np.float32)), model)
    x = torch.as_tensor(table(1, 1), dtype=torch.float32)
    found = seeded(lambda: adapter.attribute(x))
    assert found.dtype == torch.float32
    assert found.shape == (1, 5)
    assert all(
        bool(torch.isfinite(g).all()) for g in parameter_gradients(found, list(model.parameters()))
    )
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            detached = seeded(lambda: adapter.attribute(x))
        assert not detached.requires_grad
        assert torch.allclose(detached, found, atol=1e-6)


@every_row
def test_nothing_is_kept_from_inference_mode(name: str) -> None:
    model, explainer, fresh, x = set_up(name)
    X = data(name, x, model)
    with torch.inference_mode():
        adapter = adapted(name, explainer, model)
        base = adapter.expected_value
        seeded(lambda: adapter(X))
    found, expected = (
        parameter_gradients(seeded(lambda a=a: a(X)).tensor, [*model.parameters()])
        for a in (adapter, fresh)
    )
    assert relative_error(found, expected) < 1e-12
    assert np.abs(base - fresh.expected_value).max() < 1e-12


@every_row
def test_refused_calls(name: str) -> None:
    model, _, adapter, x = set_up(name)
    x = torch.as_tensor(x)
    with pytest.raises(TypeError, match="an option of"):
        adapter.attribute(x, samples=3)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        adapter.attribute(x.numpy())
    with pytest.raises(TypeError, match="baselines"):
        AttributionPrior(adapter, l2)(x, baselines=x)
    for way in ("recompute", "finite_difference"):
        if way not in ROWS[name].differentiations:
            with pytest.raises(NotDifferentiableError, match=name):
                adapted(name, stock(name, model), model, differentiation=way)
    if name in ("KernelExplainer", "SamplingExplainer"):
        with pytest.raises(NotDifferentiableError, match="require no gradient"):
            adapter.attribute(x.clone().requires_grad_())
    else:
        given = x.clone().requires_grad_()
        certificate = check_differentiable(
            adapter, given, parameters=model.named_parameters(), **QUICK.get(name, {})
        )
        assert "inputs[0]" in certificate.errors


@every_row
def test_is_a_plain_object_around_an_explainer_that_stays_as_it_is(name: str) -> None:
    model = model_for(name, 1).eval()
    explainer = stock(name, model)
    kept, inner = dict(vars(explainer)), dict(vars(getattr(explainer, "explainer", explainer)))
    adapter = adapted(name, explainer, model)
    seeded(lambda: adapter(data(name, table(2, 1), model)))
    assert type(adapter).__mro__[-2:] == (ShapAdapter, object)
    assert adapter.explainer is explainer
    assert type(explainer) is getattr(shap, name)
    assert vars(explainer) == kept
    assert vars(getattr(explainer, "explainer", explainer)) == inner


@every_pair
def test_targets_of_many_outputs(name: str, outputs: int) -> None:
    """SHAP's values are linear in the outputs, and the same draws serve all of them."""
    _, _, adapter, x = set_up(name, outputs)
    options = QUICK.get(name, {})

    def maps(target: Any) -> Tensor:
        found = seeded(lambda: adapter.attribute(torch.as_tensor(x), target=target, **options))
        assert found.requires_grad
        return found.detach()

    alone = torch.stack([maps(k) for k in range(outputs)], 1)
    assert alone.shape == (3, outputs, 5)
    chosen = [2 % outputs, 0, 1 % outputs]
    for target in (torch.tensor(chosen), chosen, [(k,) for k in chosen]):
        of_each = alone[torch.arange(3), chosen]
        torch.testing.assert_close(maps(target), of_each, rtol=0, atol=1e-9)
    for missing in (None, outputs) if outputs > 1 else (outputs,):
        with pytest.raises(ValueError, match="`target`"):
            maps(missing)
    weights = torch.arange(3.0 * outputs).reshape(3, outputs) - 1
    sums = (weights.unsqueeze(2) * alone).sum(1)
    # SHAP picks the features of each output by itself only beyond a number that is not here.
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(maps(each()), alone, **close)
    torch.testing.assert_close(maps(weighted(weights)), sums, **close)
    torch.testing.assert_close(maps(total()), alone.sum(1), **close)
    both = each([outputs - 1, weighted(shared(weights[0]))])
    expected = torch.stack([alone[:, -1], (weights[0, :, None] * alone).sum(1)], 1)
    torch.testing.assert_close(maps(both), expected, **close)
