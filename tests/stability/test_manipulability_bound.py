"""No attack moves a gradient by more than its bound."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors import NotDifferentiableError
from captum_priors.attacks.ball import balls, climb, draw, per_example
from captum_priors.stability import manipulability_bound, smooth_activations
from tests import oracles
from tests.asserts import leaves_no_trace
from tests.cases import TwoInputs


def gradient(model: nn.Module, x: Tensor, target: Any, *, graph: bool = False) -> Tensor:
    x = x if x.requires_grad else x.requires_grad_()
    outputs = model(x).gather(1, target.reshape(-1, 1)).sum()
    (found,) = torch.autograd.grad(outputs, x, create_graph=graph)
    return found


def attack(model: nn.Module, x: Tensor, target: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Strongest change of the gradient in a Euclidean ball: projected ascent with restarts."""
    start = gradient(model, x.clone(), target).detach()
    region, generator = balls((x,), radius, "L2"), torch.Generator().manual_seed(0)

    def change(points: tuple[Tensor, ...]) -> Tensor:
        moved = gradient(model, points[0], target, graph=True) - start
        return moved.flatten(1).norm(dim=1)

    best, points = torch.zeros(len(x)), x
    for _ in range(3):
        drawn = draw(region, "uniform", generator)
        (end,) = climb(region, drawn, change, 0.15 * radius, 25)
        found = change((end.requires_grad_(),)).detach()
        points = torch.where(per_example(found > best, x), end.detach(), points)
        best = torch.maximum(best, found)
    return best, points


def mlp(beta: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), nn.Softplus(beta), nn.Linear(8, 6), nn.Softplus(beta), nn.Linear(6, 3)
    )


def one_hidden(beta: float) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Softplus(beta), nn.Linear(3, 2))


def tanh_mlp(beta: float) -> nn.Module:
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval()


def cnn(beta: float) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Softplus(beta)),
        nn.Sequential(nn.Conv2d(3, 4, 2, stride=2, groups=1), nn.Softplus(beta)),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)),
    )


def smoothed_relu(beta: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return smooth_activations(model, beta)


NETWORKS = [mlp, one_hidden, tanh_mlp, cnn, smoothed_relu]


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    shape = (1, 4, 4) if images else (4,)
    return torch.randn(6, *shape), torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("beta", [1.0, 10.0])
@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("radius", [0.1, 2.0])
def test_bounds_are_never_exceeded_by_an_attack(make: Any, beta: float, radius: float) -> None:
    model = make(beta)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    x, target = batch(model)
    moved, end = attack(model, x, target, radius)
    with torch.no_grad():
        distance = (end - x).flatten(1).norm(dim=1)
    assert bool((distance <= radius * (1 + 1e-9)).all())
    bounds = {
        (form, norm): manipulability_bound(model, x, end, target, form=form, norm=norm, n_steps=15)
        for form in ("product", "path")
        for norm in ("spectral", "frobenius")
    }
    for name, bound in bounds.items():
        assert bound.shape == (6,), name
        assert bool((moved <= bound).all()), name
    # In order: each form is tighter in spectral norms, and the product holds everywhere.
    for form in ("product", "path"):
        assert bool((bounds[form, "spectral"] <= bounds[form, "frobenius"] * (1 + 1e-9)).all())
    assert bool((bounds["path", "frobenius"] <= bounds["product", "spectral"]).all())
    # An attack that hardly moved anything would have proved nothing.
    assert bool((moved > 0.25 * bounds["path", "spectral"]).any())
    assert float(moved.min()) > 0


def test_bound_is_reached() -> None:
    """One unit at the bend of Softplus, moved a little along its weight."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Softplus(4.0), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].bias.zero_()
    w = model[0].weight.detach()
    x = torch.zeros(1, 3)
    end = x + 1e-4 * w
    moved = gradient(model, end, torch.zeros(1).long()) - gradient(model, x, torch.zeros(1).long())
    for form in ("product", "path"):
        bound = manipulability_bound(model, x, end, 0, form=form)
        assert float(moved.norm() / bound) == pytest.approx(1, abs=1e-6)


def curvature(model: nn.Module, shape: Any = (4,), norm: Any = "spectral") -> float:
    """The product form's bound on the Hessian of any output."""
    x = torch.zeros(1, *shape)
    end = x.clone()
    end.view(-1)[0] = 1  # at a distance of one
    return manipulability_bound(model, x, end, norm=norm).item()


def test_product_form_written_out() -> None:
    model = mlp(3.0)
    norms = [np.linalg.norm(model[i].weight.detach().numpy(), 2) for i in (0, 2, 4)]
    a, b, c = norms
    expected = 3 / 4 * (a**2 * b * c + a**2 * b**2 * c)
    assert curvature(model) == pytest.approx(expected)
    fa, fb, fc = (np.linalg.norm(model[i].weight.detach().numpy()) for i in (0, 2, 4))
    expected = 3 / 4 * (fa**2 * fb * fc + fa**2 * fb**2 * fc)
    assert curvature(model, norm="frobenius") == pytest.approx(expected)
    row = np.linalg.norm(model[4].weight[2].detach().numpy())
    x = torch.randn(2, 4)
    bound = manipulability_bound(model, x, x + 1, 2)
    assert bound[0].item() == pytest.approx(2 * 3 / 4 * (a**2 * b + a**2 * b**2) * row)
    each = manipulability_bound(model, x, x + 1, torch.tensor([2, 0]))
    assert each[0] == bound[0]
    assert each[1] != each[0]


def batch_norm(variance: float) -> nn.Module:
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(variance)
    return norm


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(2, 3, 3), (2, 8)),
        (nn.Conv2d(1, 5, 3, padding=1), (1, 5, 5)),
        (nn.Conv2d(4, 6, 2, stride=2, groups=2), (4, 4, 4)),
        (nn.Conv2d(2, 2, 3, padding=2, dilation=2), (2, 6, 6)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
        (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
        (nn.AvgPool1d(3, 2, padding=1), (2, 7)),
        (nn.AvgPool2d(2), (1, 6, 6)),
        (nn.AvgPool2d(3, 1), (1, 6, 6)),
        (nn.AvgPool2d(2, 3), (1, 6, 6)),
        (nn.AvgPool1d(2, ceil_mode=True), (1, 5)),
        (nn.AvgPool2d(3, padding=1, divisor_override=4), (1, 5, 5)),
        (nn.AdaptiveAvgPool2d(1), (2, 3, 3)),
        (batch_norm(4.0), (2,)),
        (nn.AdaptiveAvgPool1d(2), (2, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_gain_of_a_layer_is_at_least_its_matrix_norm(module: Any, shape: Any, norm: str) -> None:
    module = module.double().eval()
    bias = getattr(module, "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)
    with torch.no_grad():
        matrix = oracles.matrix_of(lambda unit: module(torch.tensor(unit)[None]), shape)
        exact = np.linalg.norm(matrix, 2)
    # Softplus of steepness 4 has curvature 1 at most: the square of what comes before remains.
    bound = curvature(nn.Sequential(module, nn.Softplus(4)), shape, norm) ** 0.5
    assert exact <= bound * (1 + 1e-12)
    assert bound < 4 * exact or norm == "frobenius"


def test_path_form_estimated_from_samples() -> None:
    model = mlp(2.0)
    x = torch.randn(6, 4)
    options: dict[str, Any] = {"form": "path", "norm": "frobenius", "n_steps": 5}
    exact = manipulability_bound(model, x, x + 0.1, 1, **options)
    near = manipulability_bound(model, x, x + 0.1, 1, n_samples=200, **options)
    # Two hundred vectors of relative standard deviation about 1, and a maximum over 5 points.
    assert float((near / exact - 1).abs().max()) < 0.3


def test_path_form_takes_tuples_and_arguments() -> None:
    model, args = TwoInputs(), (torch.rand(4) + 0.5, 2.0)
    a, b = torch.randn(4, 2, 2), torch.randn(4, 3)
    ends = (a + 0.2, b - 0.3)
    with leaves_no_trace(model):
        bound = manipulability_bound(model, (a, b), ends, 1, args, form="path")

    def slopes(*inputs: Tensor) -> Tensor:
        inputs = tuple(t.clone().requires_grad_() for t in inputs)
        found = torch.autograd.grad(model(*inputs, *args)[:, 1].sum(), inputs)
        return torch.cat([f.flatten(1) for f in found], 1)

    moved = (slopes(*ends) - slopes(a, b)).norm(dim=1)
    assert bool((moved <= bound).all())
    assert bool((moved > 0.1 * bound).any())


def test_train_mode_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Dropout(0.5))
    model.append(nn.Linear(8, 3))
    x = torch.randn(6, 4)
    with leaves_no_trace(model, tensors=[x]):
        product = manipulability_bound(model, x, x + 0.1, 1)
        path = manipulability_bound(model, x, x + 0.1, 1, form="path")
    assert bool((path < product).all())
    assert not product.requires_grad
    assert not path.requires_grad
    with torch.inference_mode():
        assert torch.equal(manipulability_bound(model, x, x + 0.1, 1, form="path"), path)


def test_kinks_are_refused_by_both_forms() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 4)
    with pytest.raises(NotDifferentiableError, match="found ReLU"):
        manipulability_bound(model, x, x + 3, 1)
    with pytest.raises(NotDifferentiableError, match="moves by no more than the sampled Hessians"):
        manipulability_bound(model, x, x + 3, 1, form="path")
    pooled = nn.Sequential(nn.Conv1d(1, 2, 2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 1))
    with pytest.raises(NotDifferentiableError, match="found MaxPool1d"):
        manipulability_bound(pooled, x[:, None, :3], x[:, None, :3] + 1, 0)
    z = torch.randn(40, 1, 3)
    with pytest.raises(NotDifferentiableError, match="moves by no more than the sampled Hessians"):
        manipulability_bound(pooled, z, -z, 0, form="path")


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + F.softplus(self.a(x)))


class Branches(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs())


@pytest.mark.parametrize(
    "model",
    [
        Skip(),
        Branches(nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)),
        nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.ConvTranspose1d(1, 2, 2)),
        nn.Sequential(
            nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect")
        ),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Sequential(nn.Linear(4, 3), nn.Softplus(threshold=1)),
        lambda x: x,
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_is_no_chain_is_refused(model: Any) -> None:
    x = torch.randn(6, 4, dtype=torch.float32)
    with pytest.raises(NotDifferentiableError, match="Use form='path'"):
        manipulability_bound(model, x, x + 1, 0)


def test_smoothed_in_a_block() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    expected = curvature(smooth_activations(model, 5.0))
    with smooth_activations(model, 5.0):
        assert curvature(model) == expected


def test_targets_of_outputs_with_more_dimensions() -> None:
    """The last linear map's row is the target's where outputs are one row for each example."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(2, 6, 4)
    any_output = manipulability_bound(model, x, x + 1)
    assert torch.equal(manipulability_bound(model, x, x + 1, (5, 2)), any_output)
    with pytest.raises(ValueError, match="one output for each of the 2 rows"):
        manipulability_bound(model, x, x + 1, 2)


def test_path_form_of_layer_norm_needs_no_third_derivative() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(2, 4)
    end = x + 1e-9
    for _ in range(2):  # checks are closer at a first call
        bound = manipulability_bound(model, x, end, 1, form="path", n_steps=2)
        for i in range(2):
            hessian = torch.autograd.functional.hessian(lambda z: model(z)[1], x[i])
            norm = torch.linalg.matrix_norm(hessian, 2)
            # Two points that are one to eight digits.
            assert bound[i].item() == pytest.approx((norm * (end - x)[i].norm()).item(), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "sum"},
        {"norm": "nuclear"},
        {"n_steps": 1},
        {"n_samples": 0, "form": "path"},
        {"target": [0, 1]},
        {"target": 3},
        {"perturbed": torch.zeros(6, 5)},
    ],
)
def test_bad_arguments_are_refused(options: Any) -> None:
    x = torch.randn(6, 4)
    given = {"perturbed": x + 1, "target": 0, **options}
    with pytest.raises(ValueError, match=r"expected .* found"):
        manipulability_bound(mlp(1.0), x, **given)


@pytest.mark.parametrize("make", [nn.Tanh, nn.Sigmoid, lambda: nn.Softplus(5.0)])
def test_constants_of_the_activations(make: Any) -> None:
    """Largest curvature and slope on a fine grid."""
    z = torch.linspace(-8, 8, 200_001).requires_grad_()
    (first,) = torch.autograd.grad(make()(z).sum(), z, create_graph=True)
    (curve,) = torch.autograd.grad(first.sum(), z)
    second = curvature(make(), (1,))
    # Softplus of steepness 4 adds a curvature of 1 times the square of the slope before it.
    slope = (curvature(nn.Sequential(make(), nn.Softplus(4)), (1,)) - second) ** 0.5
    for seen, bound in ((float(curve.abs().max()), second), (first.max().item(), slope)):
        assert seen <= bound + 1e-12
        assert math.isclose(seen, bound, rel_tol=1e-6)  # of the grid
