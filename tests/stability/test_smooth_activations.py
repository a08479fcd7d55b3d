"""ReLU as Softplus: every spelling of it, in place of the model and in a block."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients, differentiable
from captum_priors.stability import smooth_activations
from tests.asserts import leaves_no_trace, relative_error
from tests.cases import DIFFERENTIATIONS

BETA = 3.0


def softplus(x: Tensor, beta: float = BETA) -> Tensor:
    return torch.log1p(torch.exp(beta * x)) / beta


def close(found: Tensor, expected: Tensor) -> None:
    # log1p(exp) by hand against torch's own: a few float64 roundings.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


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


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_every_spelling(relu: Any) -> None:
    model, x = Function(relu), torch.randn(7).requires_grad_()
    smooth = smooth_activations(model, BETA)
    close(smooth(x), softplus(x))
    with smooth as inside:
        assert inside is model
        close(model(x), softplus(x))
    assert torch.equal(model(x), x.clamp_min(0))
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
    close(smooth_activations(model, BETA)(x), 2 * softplus(model.linear(x)))


def test_large_beta_tends_to_relu() -> None:
    x = torch.randn(100)
    # The largest difference, at zero, is log(2) / beta.
    difference = (smooth_activations(nn.ReLU(), 1e4)(x) - x.relu()).abs().max()
    assert 0 < float(difference) < 0.7 / 1e4


def test_other_activations_and_pooling_stay() -> None:
    model = nn.Sequential(nn.LeakyReLU(), nn.ReLU6(), nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2))
    x = torch.randn(3, 6)
    assert torch.equal(smooth_activations(model, BETA)(x), model(x))


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)
    )


def softplus_net(model: nn.Sequential, beta: float = BETA) -> nn.Module:
    return nn.Sequential(
        *(Function(lambda x: softplus(x, beta)) if isinstance(m, nn.ReLU) else m for m in model)
    )


def test_parameters_are_shared_and_copies_are_not() -> None:
    model, x = net(), torch.randn(3, 4)
    smooth = smooth_activations(model, BETA)
    assert all(a is b for a, b in zip(model.parameters(), smooth.parameters(), strict=True))
    assert "beta=3" in repr(smooth)
    with smooth:
        pass
    twin = copy.deepcopy(smooth)
    assert torch.equal(twin(x), smooth(x))
    assert twin.model is not model


def test_a_block_smooths_whatever_runs_in_it() -> None:
    model, other, x = net(), net(), torch.randn(3, 4)
    before = other(x)
    with smooth_activations(model, BETA):
        close(model(x), softplus_net(model)(x))
        close(other(x), softplus_net(other)(x))
    assert torch.equal(other(x), before)


def test_inner_block_wins_and_gives_back() -> None:
    model, x = net(), torch.randn(3, 4)
    with smooth_activations(model, 1.0):
        with smooth_activations(model, 20.0):
            inner = model(x)
        outer = model(x)
    close(inner, softplus_net(model, 20.0)(x))
    close(outer, softplus_net(model, 1.0)(x))


def test_one_object_can_be_entered_twice() -> None:
    x = torch.randn(5)
    smooth = smooth_activations(nn.ReLU(), BETA)
    for _ in range(2):
        with smooth, smooth:
            close(F.relu(x), softplus(x))
        assert torch.equal(F.relu(x), x.clamp_min(0))


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the model fails")


@pytest.mark.parametrize("as_block", [True, False])
def test_relu_is_back_after_an_exception(as_block: bool) -> None:
    model, x = Failing(), torch.randn(5)
    smooth = smooth_activations(model, BETA)
    with leaves_no_trace(model):
        if as_block:
            with pytest.raises(RuntimeError, match="the model fails"), smooth:
                model(x)
        else:
            with pytest.raises(RuntimeError, match="the model fails"):
                smooth(x)
        assert torch.equal(F.relu(x), x.clamp_min(0))


def test_one_object_entered_in_two_threads() -> None:
    x, smooth = torch.randn(5), smooth_activations(nn.ReLU(), BETA)
    entered, left = threading.Event(), threading.Event()
    found = []

    def meanwhile() -> None:
        with smooth:
            entered.set()
            left.wait()
            found.append(F.relu(x))
        found.append(F.relu(x))

    thread = threading.Thread(target=meanwhile)
    with smooth:
        thread.start()
        entered.wait()
    assert torch.equal(F.relu(x), x.clamp_min(0))
    left.set()
    thread.join()
    close(found[0], softplus(x))
    assert torch.equal(found[1], x.clamp_min(0))


EXPLAINERS: dict[str, Callable[[Any], Any]] = {
    "Saliency": Saliency,
    "IntegratedGradients": IntegratedGradients,
    "ExpectedGradients": ExpectedGradients,
}


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("name", EXPLAINERS)
@pytest.mark.parametrize("as_block", [True, False])
def test_backward_after_the_block_is_left(name: str, way: Any, as_block: bool) -> None:
    model, x = net(), torch.randn(3, 4)
    options = {"baselines": torch.zeros(1, 4)} if name == "ExpectedGradients" else {}

    def gradients(explained: nn.Module, block: Any = None) -> list[Tensor]:
        torch.manual_seed(1)
        explainer = differentiable(EXPLAINERS[name](explained), differentiation=way)
        if block is None:
            attributions = explainer.attribute(x, target=1, **options)
        else:
            with block:
                attributions = explainer.attribute(x, target=1, **options)
        weights = [m.weight for m in model if isinstance(m, nn.Linear)]
        return list(torch.autograd.grad(attributions.square().sum(), weights))

    smooth = smooth_activations(model, BETA)
    found = gradients(model, smooth) if as_block else gradients(smooth)
    # Softplus by hand and by torch round differently; difference quotients take the same step.
    assert relative_error(found, gradients(softplus_net(model))) < 1e-9
    assert relative_error(gradients(model), found) > 1e-2  # ReLU would have given something else


@pytest.mark.parametrize("beta", [0, -1.0, float("inf"), float("nan"), True, "3", None])
def test_bad_steepness_is_refused(beta: Any) -> None:
    with pytest.raises(ValueError, match=rf"`beta`: expected a positive finite .*found {beta!r}\."):
        smooth_activations(nn.ReLU(), beta)
