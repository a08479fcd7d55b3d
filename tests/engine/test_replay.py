"""A gradient that is made later is that of the value: it sees what the value saw, or says so."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from captum_priors._errors import TargetError
from captum_priors.penalties import l2
from tests.asserts import (
    gradients_of,
    leaves_no_trace,
    parameter_gradients,
    relative_error,
)
from tests.cases import DIFFERENTIATIONS, EXACT, attribute, mlp
from tests.laws.leaves import FEATURES, background

REPLAYING = DIFFERENTIATIONS[1:]
every_replay = pytest.mark.parametrize("way", REPLAYING)
ORDER = 1e-12  # sums in another order


@pytest.mark.parametrize("flipped", [True, False])
def test_mode_of_the_forward_pass_is_used(flipped: bool) -> None:
    """eval() while explaining, train() before backward: the usual order in a training step."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout()), torch.randn(5, 4)
    model.append(nn.Tanh()).append(nn.Linear(8, 1)).eval()
    exact = parameter_gradients(attribute(model, x, "double_backprop"), list(model.parameters()))
    value = attribute(model, x, "recompute")
    model.train(flipped)
    with leaves_no_trace(model):
        found = parameter_gradients(value, list(model.parameters()))
    assert relative_error(found, exact) < ORDER


def test_dropout_masks_repeat() -> None:
    """A bare call in train mode draws masks; the backward pass draws the same ones."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    x, found = torch.randn(5, 4), []
    for way in EXACT:
        torch.manual_seed(7)
        value = attribute(model, x, way, internal_batch_size=5)
        torch.randn(100)  # training goes on drawing before backward()
        with leaves_no_trace(model):
            found.append(parameter_gradients(value, list(model.parameters())))
    assert relative_error(found[1], found[0]) < ORDER


def test_refusals_of_finite_difference() -> None:
    x = torch.randn(5, 4)
    dropout = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    with pytest.raises(NotDifferentiableError, match="draws random numbers"):
        attribute(dropout, x, "finite_difference")
    hooked = mlp().model
    hooked[0].register_full_backward_hook(lambda module, grads, outputs: (2 * grads[0],))
    value = attribute(hooked, x, "finite_difference", target=0)
    with pytest.raises(NotDifferentiableError, match="of 15 examples that do not"):
        value.sum().backward()
    with pytest.raises(TargetError, match='reduction="none"'):
        attribute(lambda z: dropout[0](z).square().sum(), x, "finite_difference")


@every_replay
def test_batch_norm_in_train_mode_is_refused(way: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with pytest.raises(NotDifferentiableError, match="BatchNorm1d in train mode"):
        attribute(model, torch.randn(6, 4), way)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU])  # torch has two formulas for SiLU's
def test_autocast_of_the_forward_pass_is_used(activation: type[nn.Module]) -> None:
    hidden = (m for _ in range(10) for m in (nn.Linear(6, 6), activation()))
    model = nn.Sequential(nn.Linear(4, 6), *hidden, nn.Linear(6, 2)).float()
    x, found = torch.randn(5, 4).float(), []
    for way in EXACT:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = attribute(model, x, way, target=1)
        found.append(parameter_gradients(value, [*model.parameters()]))
    assert relative_error(found[1], found[0]) < 6e-2  # eight bits in another order


def test_finite_difference_in_bfloat16() -> None:
    model = nn.Sequential(nn.Linear(30, 128), nn.Softplus(), nn.Linear(128, 3)).float()
    x, parameters = torch.randn(64, 30).float(), [*model.parameters()]
    exact = parameter_gradients(attribute(model, x, "double_backprop", target=1), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = attribute(model, x, "finite_difference", target=1)
    found = parameter_gradients(value, parameters)
    # Eight bits over a 10 % step: 1 to 4 % on trained networks, more here, and the same direction.
    flat, flat_exact = (torch.cat([g.flatten() for g in each]) for each in (found, exact))
    assert float(torch.cosine_similarity(flat, flat_exact, dim=0)) > 0.97


@every_replay
def test_parameters_changed_before_backward_are_an_error(way: str) -> None:
    case = mlp()
    value = attribute(case.model, case.inputs, way, target=1)
    with torch.no_grad():
        case.model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_model_that_changed_behind_the_back_is_an_error() -> None:
    case, scale = mlp(), [1.0]
    value = attribute(lambda z: case.model(z)[:, 0] * scale[0], case.inputs, "recompute")
    scale[0] = 3.0
    with pytest.raises(NotDifferentiableError, match="changed in between"):
        value.sum().backward()


# ---- Buffers that a training pass moves between the prior and its backward pass ----------------


class RunningNorm(nn.Module):
    """Statistics of its own, moved by every training pass: in place or by a new tensor."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                moved = (self.mu.lerp(x.mean(0), 0.3), self.var.lerp(x.var(0), 0.3))
                if self.in_place:
                    self.mu.copy_(moved[0])
                    self.var.copy_(moved[1])
                else:
                    self.mu, self.var = moved
        return (x - self.mu.clone()) / (self.var.clone() + 1e-5).sqrt()


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "own-in-place": lambda: [nn.Linear(FEATURES, 8), RunningNorm(in_place=True)],
    "own-assigned": lambda: [nn.Linear(FEATURES, 8), RunningNorm(in_place=False)],
    "BatchNorm": lambda: [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8)],
    "BatchNorm-running": lambda: [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8)],
    "spectral_norm": lambda: [
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 8))
    ],
}
EXPLAINERS: dict[str, tuple[Callable[[nn.Module, Any], Any], dict[str, Any]]] = {
    "Saliency": (lambda m, w: differentiable(ca.Saliency(m), differentiation=w), {"abs": False}),
    "IG": (
        lambda m, w: differentiable(ca.IntegratedGradients(m), differentiation=w),
        {"n_steps": 4},
    ),
    "EG": (
        lambda m, w: ExpectedGradients(m, differentiation=w),
        {"n_samples": 2, "baselines": background()},
    ),
}


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_buffers_of_the_forward_pass(explainer: str, kind: str, way: str) -> None:
    model = nn.Sequential(*LAYERS[kind](), nn.Tanh(), nn.Linear(8, 3)).train()
    x, y, (explain, options) = (
        torch.randn(16, FEATURES),
        torch.arange(16) % 3,
        EXPLAINERS[explainer],
    )
    for _ in range(3):
        model(torch.randn(16, FEATURES))
    if kind == "BatchNorm-running":
        options = {**options, "batch_norm": "running"}
    prior = AttributionPrior(explain(model, way), l2, **options).eval()
    parameters = [*model.parameters()]
    expected = gradients_of(prior(x, target=y), parameters)
    value = prior(x, target=y)
    model(5 * torch.randn(16, FEATURES) + 3)
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert relative_error(gradients_of(value, parameters), expected) < ORDER
    for name, buffer in model.named_buffers():  # and the training's own are where it left them
        assert torch.equal(buffer, after[name]), name


def test_buffers_of_a_bare_call() -> None:
    """Outside a prior nobody else has copies of them."""
    layers = nn.Linear(4, 8), RunningNorm(in_place=True), nn.Tanh(), nn.Linear(8, 1)
    model, x = nn.Sequential(*layers).eval(), torch.randn(5, 4)
    exact = parameter_gradients(attribute(model, x, "double_backprop"), list(model.parameters()))
    value = attribute(model, x, "recompute")
    model.train()(5 * torch.randn(16, 4) + 3)
    found = parameter_gradients(value, list(model.eval().parameters()))
    assert relative_error(found, exact) < ORDER
