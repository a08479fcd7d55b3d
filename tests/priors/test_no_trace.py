"""A prior never disturbs training: not when it succeeds, fails, or is replayed in backward."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Lazy,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors.distances import mse
from captum_priors.engine import Stream
from captum_priors.penalties import l1
from captum_priors.priors import Prior
from tests.asserts import assert_same_state, leaves_no_trace, state_of
from tests.cases import DIFFERENTIATIONS, Everything
from tests.laws.leaves import REGULARIZERS, Leaf, way_options


def _attribution(model: nn.Module, x: Tensor, way: Any) -> Prior:
    explainer = ExpectedGradients(model, differentiation=way)
    return AttributionPrior(explainer, l1, baselines=x, smooth=20, n_samples=3)


def _stability(model: nn.Module, x: Tensor, way: Any) -> Prior:
    explainer = differentiable(Saliency(model), differentiation=way)
    return StabilityPrior(explainer, mse, lambda x: x + 0.1 * torch.randn_like(x))


def _wrapped(model: nn.Module, x: Tensor, way: Any) -> Prior:
    return 0.5 * (Subsample(_attribution(model, x, way), 0.5) + Lazy(_stability(model, x, way), 1))


def _regularizer(leaf: Leaf) -> Any:
    # ReLU as Softplus, so that there is curvature to penalise.
    return lambda model, x, way: leaf.make(model, smooth=20, **way_options(leaf, way))


_PRIORS = {p.__name__: p for p in (_attribution, _stability, _wrapped)}
_REGULARIZERS = {leaf.name: _regularizer(leaf) for leaf in REGULARIZERS}
_WAYS = {leaf.name: leaf.ways for leaf in REGULARIZERS}
_DRAWING = _PRIORS | {leaf.name: _regularizer(leaf) for leaf in REGULARIZERS if leaf.draws}

every_prior = pytest.mark.parametrize("make", _DRAWING.values(), ids=_DRAWING.keys())
every_prior_and_way = pytest.mark.parametrize(
    ("make", "way"),
    [
        pytest.param(make, way, id=f"{name}-{way}")
        for name, make in (_PRIORS | _REGULARIZERS).items()
        for way in _WAYS.get(name, DIFFERENTIATIONS)
    ],
)


def _trained() -> tuple[Everything, Tensor, Tensor]:
    """A model in the middle of training, with gradients and statistics."""
    model, x = Everything(), torch.randn(8, 6, 4)
    y = torch.randint(2, (8,))
    F.cross_entropy(model(x), y).backward()
    return model, x, y


@every_prior_and_way
def test_call_and_backward(make: Any, way: Any) -> None:
    model, x, y = _trained()
    prior = make(model, x, way)
    with leaves_no_trace(model, tensors=[x]):
        value = prior(x, target=y)
    before = state_of(model, tensors=[x])
    value.backward()
    after = state_of(model, tensors=[x])
    assert not all(map(torch.equal, before["grad"][:-1], after["grad"][:-1]))
    # Backward adds to the parameters' gradients, and to nothing else, the inputs' included.
    assert after["grad"][-1] is None
    assert_same_state({k: v for k, v in before.items() if k != "grad"}, after)


@every_prior_and_way
@pytest.mark.parametrize("fails_after", [0, 1])
def test_model_that_raises(make: Any, way: Any, fails_after: int) -> None:
    model, x, y = _trained()
    prior = make(model, x, way)
    model.fails_after = fails_after
    if fails_after:
        prior = prior + _stability(model, x, way)  # a single pass would not fail
    with leaves_no_trace(model, tensors=[x]), pytest.raises(RuntimeError, match="fails midway"):
        prior(x, target=y)
    assert F.relu(-torch.ones(1)).item() == 0


@pytest.mark.parametrize("way", ["recompute", "finite_difference"])
def test_model_that_raises_in_the_replay(way: Any) -> None:
    model, x, y = _trained()
    value = _attribution(model, x, way)(x, target=y)
    model.fails_after = 0
    with leaves_no_trace(model, tensors=[x]), pytest.raises(RuntimeError, match="fails midway"):
        value.backward()
    assert F.relu(-torch.ones(1)).item() == 0


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_call_without_gradients(block: Any) -> None:
    model, x, y = _trained()
    prior = _wrapped(model, x, "double_backprop")
    with leaves_no_trace(model, prior, tensors=[x]), block():
        assert not prior(x, target=y).requires_grad


def test_refused_call_changes_nothing_of_the_prior() -> None:
    model, x, y = _trained()
    prior = _wrapped(model, x, "double_backprop")
    with leaves_no_trace(model, prior, tensors=[x]), pytest.raises(TypeError, match="annotation"):
        prior(x, target=y, annotation=x)


@every_prior_and_way
def test_training_with_weight_zero_is_training_without(make: Any, way: Any) -> None:
    start, x, y = _trained()
    twins = [copy.deepcopy(start), copy.deepcopy(start)]
    ends = []
    for model, has_prior in zip(twins, (False, True), strict=True):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        prior = 0 * make(model, x, way)
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if has_prior:
                loss = loss + prior(x, target=y)
            loss.backward()
            optimizer.step()
        ends.append(state_of(model))
    assert_same_state(*ends)
    assert not any(map(torch.equal, start.parameters(), twins[0].parameters()))


def _values(prior: Prior, x: Tensor, n: int) -> list[float]:
    return [prior(x, target=1).item() for _ in range(n)]


@every_prior
def test_draws_differ_and_continue_from_the_state_dict(make: Any) -> None:
    model, x, _ = _trained()
    prior = make(model, x, "double_backprop")
    _values(prior, x, 2)
    saved = copy.deepcopy(prior.state_dict())
    continued = _values(prior, x, 4)
    assert len(set(continued)) == 4
    torch.manual_seed(99)  # a prior made under another seed
    resumed = make(model, x, "double_backprop")
    assert _values(resumed, x, 4) != continued
    resumed.load_state_dict(saved)
    assert _values(resumed, x, 4) == continued
    # Evaluation has one seed of its own: values can be compared over time.
    looked = set(_values(prior.eval(), x, 2) + _values(resumed.eval(), x, 1))
    assert len(looked) == 1
    assert not looked & set(continued)


def test_moving_a_prior_keeps_its_counters_whole() -> None:
    model, x, _ = _trained()
    prior = _wrapped(model, x, "double_backprop")
    seeds = [int(m.seed) for m in prior.modules() if isinstance(m, Stream)]
    assert len(set(seeds)) == len(seeds) == 3  # Subsample and the priors inside draw apart
    prior(x, target=1)
    before = copy.deepcopy(prior.state_dict())
    prior.to(torch.float16)
    prior.to("meta")  # any other device: the host reads the counters at every step
    assert_same_state(before, prior.state_dict())
    kinds = {(t.dtype, t.device.type) for t in prior.state_dict().values()}
    assert kinds == {(torch.int64, "cpu")}
