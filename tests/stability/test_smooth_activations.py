"""ReLU as Softplus: every spelling of it, in place of the model and around it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients, differentiable
from captum_priors._engine._smooth import relu_as_softplus
from captum_priors.stability import smooth_activations
from tests.asserts import leaves_no_trace, relative_error
from tests.cases import DIFFERENTIATIONS

BETA = 3.0


def _softplus(x: Tensor, beta: float = BETA) -> Tensor:
    return torch.log1p(torch.exp(beta * x)) / beta


class Function(nn.Module):
    """A model that is one function of its input, made fresh for in-place variants."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone())


RELUS = {
    "module": nn.ReLU(),
    "module-in-place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu-keyword": lambda x: F.relu(input=x),
    "F.relu-in-place": lambda x: F.relu(x, inplace=True),
    "F.relu-in-place-positional": lambda x: F.relu(x, True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu-keyword": lambda x: torch.relu(input=x),
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
}
every_relu = pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)


def _close(found: Tensor, expected: Tensor) -> None:
    # log1p(exp) by hand against torch's own: a few float64 roundings.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@every_relu
def test_in_place_of_the_model(relu: Any) -> None:
    model, x = Function(relu), torch.randn(7)
    _close(smooth_activations(model, BETA)(x), _softplus(x))
    assert torch.equal(model(x), x.clamp_min(0))


@every_relu
def test_as_a_context(relu: Any) -> None:
    model, x = Function(relu), torch.randn(7)
    with smooth_activations(model, BETA) as inside:
        assert inside is model
        _close(model(x), _softplus(x))
    assert torch.equal(model(x), x.clamp_min(0))


@every_relu
def test_gradients_are_those_of_softplus(relu: Any) -> None:
    x = torch.randn(7).requires_grad_()
    smooth = smooth_activations(Function(relu), BETA)
    assert torch.autograd.gradcheck(smooth, x)
    assert torch.autograd.gradgradcheck(smooth, x)


def test_in_place_relu_of_a_residual_changes_the_skip_too() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            return hidden + self.relu(hidden)

    model, x = Residual(), torch.randn(3, 4)
    # ReLU writes over the hidden tensor, so both terms are the activation: so with Softplus.
    torch.testing.assert_close(model(x), 2 * model.linear(x).relu(), rtol=0, atol=0)
    _close(smooth_activations(model, BETA)(x), 2 * _softplus(model.linear(x)))


def test_large_beta_tends_to_relu() -> None:
    model, x = Function(F.relu), torch.randn(100)
    # The largest difference, at zero, is log(2) / beta.
    difference = (smooth_activations(model, 1e4)(x) - model(x)).abs().max()
    assert 0 < float(difference) < 0.7 / 1e4


def test_other_activations_and_pooling_stay() -> None:
    model = nn.Sequential(nn.LeakyReLU(), nn.ReLU6(), nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2))
    x = torch.randn(3, 6)
    assert torch.equal(smooth_activations(model, BETA)(x), model(x))


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)
    )


def _softplus_net(model: nn.Module, beta: float = BETA) -> nn.Module:
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(
        *(Function(lambda x: _softplus(x, beta)) if isinstance(m, nn.ReLU) else m for m in model)
    )


def test_parameters_are_shared() -> None:
    model = _net()
    smooth = smooth_activations(model, BETA)
    assert all(a is b for a, b in zip(model.parameters(), smooth.parameters(), strict=True))
    assert "beta=3" in repr(smooth)


def test_context_smooths_that_model_only() -> None:
    model, other, x = _net(), _net(), torch.randn(3, 4)
    with smooth_activations(model, BETA):
        _close(model(x), _softplus_net(model)(x))
        assert torch.equal(F.relu(x), x.clamp_min(0))
        outside = other(x)
    assert torch.equal(outside, other(x))


def test_context_of_a_submodule_smooths_that_submodule_only() -> None:
    first, second = _net(), nn.Sequential(nn.ReLU())
    model, x = nn.Sequential(first, second), torch.randn(3, 4)
    with smooth_activations(first, BETA):
        found = model(x)
    _close(found, _softplus_net(first)(x).clamp_min(0))


def test_inner_context_wins_and_gives_back() -> None:
    model, x = _net(), torch.randn(3, 4)
    with smooth_activations(model, 1.0):
        with smooth_activations(model, 20.0):
            inner = model(x)
        outer = model(x)
    _close(inner, _softplus_net(model, 20.0)(x))
    _close(outer, _softplus_net(model, 1.0)(x))


def test_inner_wrapper_wins_and_gives_back() -> None:
    model, x = Function(F.relu), torch.randn(3, 4)
    both = nn.Sequential(smooth_activations(model, 20.0), nn.ReLU())
    found = smooth_activations(both, 1.0)(x)
    _close(found, _softplus(_softplus(x, 20.0), 1.0))


def test_one_object_can_be_entered_twice() -> None:
    model, x = _net(), torch.randn(3, 4)
    smooth = smooth_activations(model, BETA)
    for _ in range(2):
        with smooth, smooth:
            _close(model(x), _softplus_net(model)(x))
        assert torch.equal(model(x), nn.Sequential(*model)(x))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the model fails")


@pytest.mark.parametrize("wrap", [True, False])
def test_relu_is_back_after_an_exception(wrap: bool) -> None:
    model = Failing()
    smooth, x = smooth_activations(model, BETA), torch.randn(5)
    with leaves_no_trace(model):
        if wrap:
            with pytest.raises(RuntimeError, match="the model fails"):
                smooth(x)
        else:
            with pytest.raises(RuntimeError, match="the model fails"), smooth:
                model(x)
        assert torch.equal(F.relu(x), x.clamp_min(0))
        assert torch.equal(model.relu(x), x.clamp_min(0))


def test_relu_is_back_within_the_context_after_an_exception() -> None:
    model, x = Failing(), torch.randn(5)
    with smooth_activations(model, BETA):
        with pytest.raises(RuntimeError, match="the model fails"):
            model(x)
        assert torch.equal(F.relu(x), x.clamp_min(0))


def test_hooks_are_there_only_within_the_context() -> None:
    model = _net()
    with leaves_no_trace(model):
        with smooth_activations(model, BETA):
            assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0


def _in_a_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_context_smooths_the_model_in_other_threads() -> None:
    model, x = _net(), torch.randn(3, 4)
    with smooth_activations(model, BETA):
        found = _in_a_thread(lambda: model(x).detach())
    _close(found, _softplus_net(model)(x).detach())


def test_running_model_does_not_smooth_other_threads() -> None:
    elsewhere = []

    def forward(x: Tensor) -> Tensor:
        elsewhere.append(_in_a_thread(lambda: F.relu(x)))
        return F.relu(x)

    x = torch.randn(5)
    _close(smooth_activations(Function(forward), BETA)(x), _softplus(x))
    with smooth_activations(model := Function(forward), BETA):
        _close(model(x), _softplus(x))
    assert len(elsewhere) == 2
    assert all(torch.equal(value, x.clamp_min(0)) for value in elsewhere)


def test_threads_smooth_with_their_own_steepness() -> None:
    elsewhere = []

    def forward(x: Tensor) -> Tensor:
        elsewhere.append(_in_a_thread(lambda: smooth_activations(nn.ReLU(), 20.0)(x)))
        return F.relu(x)

    x = torch.randn(5)
    _close(smooth_activations(Function(forward), BETA)(x), _softplus(x))
    _close(elsewhere[0], _softplus(x, 20.0))


EXPLAINERS: dict[str, Callable[[Any], Any]] = {
    "Saliency": Saliency,
    "IntegratedGradients": IntegratedGradients,
    "ExpectedGradients": ExpectedGradients,
}


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("name", EXPLAINERS)
@pytest.mark.parametrize("as_context", [True, False])
def test_backward_after_the_context_is_left(name: str, way: Any, as_context: bool) -> None:
    model, x = _net(), torch.randn(3, 4)
    twin = _softplus_net(model)
    options = {"baselines": torch.zeros(1, 4)} if name == "ExpectedGradients" else {}

    def gradients(of: nn.Module, *, smooth: bool) -> list[Tensor]:
        torch.manual_seed(1)
        explained = smooth_activations(of, BETA) if smooth and not as_context else of
        explainer = differentiable(EXPLAINERS[name](explained), differentiation=way)
        if smooth and as_context:
            with smooth_activations(of, BETA):
                attributions = explainer.attribute(x, target=1, **options)
        else:
            attributions = explainer.attribute(x, target=1, **options)
        found = torch.autograd.grad(
            attributions.square().sum(), list(of.parameters()), allow_unused=True
        )
        return [g for g in found if g is not None]

    found, expected = gradients(model, smooth=True), gradients(twin, smooth=False)
    # Softplus by hand and by torch round differently; difference quotients take the same step.
    assert relative_error(found, expected) < 1e-9
    assert len(model._forward_hooks) == 0
    assert torch.equal(model(x), nn.Sequential(*model)(x))
    # ReLU would have given something else.
    rough = gradients(model, smooth=False)
    assert len(rough) != len(found) or relative_error(rough, found) > 1e-2


@pytest.mark.parametrize("way", ["recompute", "finite_difference"])
def test_backward_within_the_context_runs_the_smoothed_model_again(way: Any) -> None:
    model, x = _net(), torch.randn(3, 4)
    twin = _softplus_net(model)

    def gradients(explained: nn.Module) -> list[Tensor]:
        explainer = differentiable(Saliency(explained), differentiation=way)
        with smooth_activations(model, BETA), relu_as_softplus(BETA):
            loss = explainer.attribute(x, target=1).square().sum()
            return list(torch.autograd.grad(loss, [m.weight for m in explained[::2]]))

    # Softplus by hand and by torch round differently; difference quotients take the same step.
    assert relative_error(gradients(model), gradients(twin)) < 1e-9
    assert torch.equal(F.relu(x), x.clamp(min=0))


@pytest.mark.parametrize("beta", [0, -1.0, float("inf"), float("nan"), True, "3", None])
def test_bad_steepness_is_refused(beta: Any) -> None:
    text = (
        rf"`beta`: expected a positive finite number .*, found {beta!r}\. Pass for example beta=30"
    )
    with pytest.raises(ValueError, match=text):
        smooth_activations(nn.ReLU(), beta)


def test_what_is_no_module_is_refused() -> None:
    text = r"`model`: expected a torch\.nn\.Module, found function\. Pass the model; a prior"
    with pytest.raises(TypeError, match=text):
        smooth_activations(F.relu, 3.0)
