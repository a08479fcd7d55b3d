"""Values against a network whose derivatives are written out by hand, one example at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_priors.stability import (
    R2ET,
    ActivationSensitivity,
    AttributionAlignment,
    CurvatureRegularization,
    HessianPenalty,
    InputGradientRegularization,
    JacobianRegularization,
    RobustAttribution,
    SaliencyGuided,
    SmoothSurface,
)
from tests import oracles
from tests.asserts import assert_unbiased
from tests.cases import Recorder, curved

# Different orders of the same float64 sums.
ROUNDING = 1e-11
N = 5


@pytest.fixture
def model() -> nn.Module:
    return curved()


@pytest.fixture
def net(model: nn.Module) -> oracles.TanhNet:
    return oracles.TanhNet.of(model)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 4)


@pytest.fixture
def y() -> Tensor:
    return torch.tensor([0, 2, 1, 1, 0])


def assert_mean(value: Tensor, each: list[float], tolerance: float = ROUNDING) -> None:
    assert abs(value.item() - np.mean(each)) <= tolerance * abs(np.mean(each))


def pairs(x: Tensor, y: Tensor) -> list[tuple[Any, int]]:
    return list(zip(x.numpy(), y.tolist(), strict=True))


def test_hessian_is_unbiased(model: nn.Module, net: Any, x: Tensor, y: Tensor) -> None:
    expected = np.mean([(net.hessian(a, c) ** 2).sum() for a, c in pairs(x, y)])
    penalty = HessianPenalty(model)
    assert_unbiased(lambda: penalty(x, target=y), torch.tensor(expected), 800)


def test_hessian_of_a_diagonal_needs_one_probe() -> None:
    """Signs square to one: without products of two features the estimate is exact."""
    x = torch.randn(N, 3)
    value = HessianPenalty(lambda x: torch.sin(x).sum(1))(x)
    assert_mean(value, [float((np.sin(a) ** 2).sum()) for a in x.numpy()])


def test_hessian_by_differences_tends_to_the_exact_one(
    model: nn.Module, x: Tensor, y: Tensor
) -> None:
    errors = []
    exact = HessianPenalty(model, 3).eval()
    for step in (0.04, 0.02, 0.01):
        near = HessianPenalty(model, 3, curvature="difference", step_size=step).eval()
        near.load_state_dict(exact.state_dict())  # the same vectors
        values = [p(x, target=y).item() for p in (exact, near)]
        errors.append(abs(values[1] / values[0] - 1))
    assert errors[2] < 2e-3
    # Second order: a quarter of the error at half the step.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_hessian_warns_once_of_a_piecewise_linear_network(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    penalty = HessianPenalty(model)
    with pytest.warns(UserWarning, match="piecewise linear"):
        assert penalty(x, target=0).item() == 0
    assert penalty(x, target=0).item() == 0
    assert HessianPenalty(model, smooth=5)(x, target=0).item() > 0
    with pytest.warns(UserWarning, match="piecewise linear"):
        assert HessianPenalty(nn.Linear(4, 3))(x, target=0).item() == 0


def test_jacobian(model: nn.Module, net: Any, x: Tensor) -> None:
    expected = [(net.jacobian(a) ** 2).sum() for a in x.numpy()]
    assert_mean(JacobianRegularization(model, None)(x), expected)
    estimate = JacobianRegularization(model)
    assert_unbiased(lambda: estimate(x), torch.tensor(np.mean(expected)), 800)


def test_input_gradient(model: nn.Module, net: Any, x: Tensor, y: Tensor) -> None:
    expected = [(net.loss_gradient(a, c) ** 2).sum() for a, c in pairs(x, y)]
    assert_mean(InputGradientRegularization(model)(x, target=y), expected)


def test_one_logit_is_a_binary_classifier(x: Tensor) -> None:
    single = nn.Linear(4, 1)
    double = nn.Linear(4, 2)
    with torch.no_grad():
        double.weight[0], double.bias[0] = 0, 0
        double.weight[1], double.bias[1] = single.weight[0], single.bias[0]
    for cls in (InputGradientRegularization, CurvatureRegularization, SmoothSurface):
        one, two = (cls(model)(x, target=1).item() for model in (single, double))
        assert one == pytest.approx(two, rel=1e-10)


def test_cure(model: nn.Module, net: Any, x: Tensor, y: Tensor) -> None:
    squares = [oracles.cure(net, a, c, 0.7) for a, c in pairs(x, y)]
    assert_mean(CurvatureRegularization(model, 0.7)(x, target=y), squares)


@pytest.mark.parametrize("near", [None, 1, 2, 9])
@pytest.mark.parametrize(("k", "c", "h"), [(1, 0.0, 0.1), (3, 0.7, 0.3)])
def test_r2et(
    model: nn.Module, net: Any, x: Tensor, y: Tensor, k: int, c: float, h: float, near: Any
) -> None:
    expected = [oracles.r2et(net, a, label, k, c, h, near) for a, label in pairs(x, y)]
    prior = R2ET(model, top_k=k, n_nearest=near, curvature=c, step_size=h)
    assert_mean(prior(x, target=y), expected)


def test_r2et_of_large_and_of_vanishing_gradients() -> None:
    """Finite wherever the gap is, and a gradient of zero, not NaN, where nothing turns."""
    w = torch.tensor([900.0, 899.0, 2.0], requires_grad=True)
    value = R2ET(lambda x: x @ w, top_k=1)(torch.randn(N, 3))
    torch.testing.assert_close(value, (torch.tensor([-1.0, -898.0])).exp().mean())
    (found,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0]) * value.detach())


def test_smooth_surface(model: nn.Module, net: Any, x: Tensor) -> None:
    expected = [oracles.softmax_hessian_eigenvalue(net, a) for a in x.numpy()]
    # The root of an eigenvalue problem.
    assert_mean(SmoothSurface(model)(x), expected, 1e-9)


def test_smooth_surface_of_a_certain_prediction_is_flat() -> None:
    model = nn.Linear(4, 3).float()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([500.0, 0.0, 0.0]))
    value = SmoothSurface(model)(torch.randn(N, 4, dtype=torch.float32))
    value.backward()
    assert value.item() == 0
    for p in model.parameters():  # not NaN, although the roots of the probabilities vanish
        assert torch.equal(p.grad, torch.zeros_like(p))


@pytest.mark.parametrize("absolute", [True, False])
def test_saliency_guided(model: nn.Module, net: Any, x: Tensor, y: Tensor, absolute: bool) -> None:
    recorder = Recorder(model)
    value = SaliencyGuided(recorder, 0.5, abs=absolute)(x, target=y)
    masked = recorder.seen[-1][0][N:].numpy()
    expected = []
    for (a, c), m in zip(pairs(x, y), masked, strict=True):
        gradient = net.jacobian(a)[c]
        least = np.argsort(np.abs(gradient) if absolute else gradient)[:2]
        assert sorted(np.flatnonzero(a != m)) == sorted(least)
        assert a.min() <= m[least].min()
        assert m[least].max() <= a.max()
        expected.append(oracles.kl(net.probabilities(a), net.probabilities(m)))
    assert_mean(value, expected)


def test_masked_features_are_uniform_between_the_smallest_and_the_largest() -> None:
    recorder, x = Recorder(nn.Linear(8, 2)), torch.rand(2000, 8) + 1
    SaliencyGuided(recorder, 1.0)(x, target=0)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    shares = (recorder.seen[-1][0][2000:] - low) / (high - low)
    assert 0 <= float(shares.min()) < 1e-3 < 0.999 < float(shares.max()) <= 1  # of 16000 draws
    assert float(shares.mean()) == pytest.approx(0.5, abs=4 / (12 * 16000) ** 0.5)


@pytest.mark.parametrize("objective", ["ig_norm", "ig_sum_norm"])
def test_robust_attribution(
    model: nn.Module, net: Any, x: Tensor, y: Tensor, objective: Any
) -> None:
    recorder = Recorder(model)
    prior = RobustAttribution(
        recorder, objective, radius=0.3, step_size=0.1, step_num=4, n_steps=30, weight=0.5
    ).eval()
    value = prior(x, target=y)
    # The last midpoint lies 59 sixtieths of the way to the worst point.
    (last,) = recorder.seen[-1 if objective == "ig_norm" else -2]
    ends = (x + (last[-N:] - x) * 60 / 59).numpy()
    assert np.abs(ends - x.numpy()).max() <= 0.3 + 1e-12
    expected, completeness = [], []
    for (a, c), end in zip(pairs(x, y), ends, strict=True):
        attributions = oracles.integrated_loss_gradients(net, a, end, c, 30)
        gain = net.cross_entropy(end, c) - net.cross_entropy(a, c)
        completeness.append(abs(attributions.sum() - gain))
        size = np.abs(attributions).sum()
        if objective == "ig_sum_norm":
            size = net.cross_entropy(end, c) + 0.5 * size
        expected.append(size)
    assert_mean(value, expected, 1e-9)
    assert max(completeness) < 1e-3  # 30 midpoints


def test_attribution_alignment(model: nn.Module, net: Any, x: Tensor, y: Tensor) -> None:
    prior = AttributionAlignment(model, radius=0.3, step_size=0.1, top_k=3)
    state = prior.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    moved = prior.perturb(x, y)
    assert all(torch.equal(value, prior.state_dict()[name]) for name, value in state.items())
    assert float((moved - x).abs().max()) <= 0.3 + 1e-12
    triplets = [
        oracles.alignment_triplet(net, a, m, c)
        for (a, c), m in zip(pairs(x, y), moved.numpy(), strict=True)
    ]
    assert_mean(prior(x, target=y), triplets)


def test_one_long_step_ends_in_a_corner(model: nn.Module, x: Tensor, y: Tensor) -> None:
    prior = AttributionAlignment(model, radius=0.3, step_size=1.0, step_num=1)
    torch.testing.assert_close((prior.perturb(x, y) - x).abs(), torch.full_like(x, 0.3))


@pytest.mark.parametrize(
    ("cls", "step_num", "gain"), [(RobustAttribution, 20, 0.1), (AttributionAlignment, 10, 0.02)]
)
def test_ascent_climbs_in_the_valid_range(
    model: nn.Module, x: Tensor, y: Tensor, cls: Any, step_num: int, gain: float
) -> None:
    recorder, values = Recorder(model), []
    options = {"radius": 0.3, "lower_bound": x.amin(0), "upper_bound": float(x.max())}
    for n, step in ((1, 1e-9), (step_num, 0.1)):
        torch.manual_seed(0)
        prior = cls(recorder, step_size=step, step_num=n, **options).eval()
        values.append(prior(x, target=y).item())
    # A random point of the ball, and one that is sought.
    assert values[1] > values[0] + gain
    seen = torch.cat([points for (points,) in recorder.seen])
    assert bool((seen >= x.amin(0) - 1e-12).all())
    assert float(seen.max()) <= float(x.max())
    with pytest.raises(ValueError, match="between `lower_bound` and `upper_bound`"):
        cls(model, lower_bound=float(x.min()) + 0.1)(x, target=y)


@pytest.mark.parametrize("scale", ["noise", None])
@pytest.mark.parametrize("noise", ["gaussian", "uniform", "sign"])
def test_small_noise_limit_of_sensitivity_is_the_jacobian(
    model: nn.Module, net: Any, x: Tensor, noise: Any, scale: Any
) -> None:
    """Per layer: the hidden units, and the logits as named layers."""
    radius = 1e-4
    hidden = np.mean([(net.hidden_jacobian(a) ** 2).sum() / 6 for a in x.numpy()])
    logits = np.mean([(net.jacobian(a) ** 2).sum() / 3 for a in x.numpy()])
    variance = radius**2 * (1 / 3 if noise == "uniform" else 1)
    for layers, expected in (([model[1]], hidden), (["1"], hidden), ([model[2]], logits)):
        prior = ActivationSensitivity(
            model, radius, layers=layers, noise=noise, scale=scale, n_samples=20
        )
        limit = torch.tensor(expected * (1 if scale == "noise" else variance))
        assert_unbiased(lambda p=prior: p(x), limit, 200)
    both = ActivationSensitivity(model, radius, layers=[model[1], model[2]], n_samples=4000)
    # A mean over layers; 20000 draws.
    assert both(x).item() == pytest.approx((hidden + logits) / 2, rel=0.05)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("scale", ["noise", "activation", None])
def test_sensitivity_neuron_by_neuron(
    model: nn.Module, net: Any, x: Tensor, power: Any, scale: Any
) -> None:
    recorder = Recorder(model)
    prior = ActivationSensitivity(
        recorder, 0.5, layers=[model[1]], power=power, scale=scale, n_samples=2
    )
    value = prior(x)
    points = recorder.seen[-1][0].numpy()
    total = []
    for i in range(N):
        for sample in (1, 2):
            noisy = points[sample * N + i]
            clean, moved = net.hidden(points[i]), net.hidden(noisy)
            for j in range(6):
                size = {
                    "noise": np.sqrt(((noisy - points[i]) ** 2).mean()),
                    "activation": abs(clean[j]) + np.abs(clean).mean(),
                    None: 1.0,
                }[scale]
                total.append((abs(moved[j] - clean[j]) / size) ** power)
    assert_mean(value, total)


def test_the_size_of_an_activation_is_a_constant_for_gradients(x: Tensor) -> None:
    """Of a linear layer the response is homogeneous in its weights, and the quotient is not."""
    layer = nn.Linear(4, 6, bias=False)
    value = ActivationSensitivity(layer, layers=[layer], scale="activation")(x)
    value.backward()
    along = (layer.weight.detach() * layer.weight.grad).sum()
    assert float(along) == pytest.approx(2 * value.item())


class Tripled(nn.Module):
    """Goes on in place with what its layer returned, and has another that does not run."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.unused = first, last, nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden *= 3
        return self.last(nn.functional.relu_(hidden))


def test_sensitivity_is_of_what_a_layer_returned(x: Tensor) -> None:
    first, last = nn.Linear(4, 6), nn.Linear(6, 3)
    twin = nn.Sequential(first, nn.Linear(6, 3))
    values = []
    for model in (Tripled(first, last), twin):
        torch.manual_seed(0)
        values.append(ActivationSensitivity(model, layers=[first]).eval()(x).item())
    assert values[0] == values[1] > 0


def test_sensitivity_by_default_is_of_the_layers_with_weights_that_run(x: Tensor) -> None:
    model = Tripled(nn.Linear(4, 6), nn.Linear(6, 3))
    values = []
    for layers in ("weights", ["first", "last"], [model.last, model.first]):
        torch.manual_seed(0)
        values.append(ActivationSensitivity(model, layers=layers).eval()(x).item())
    assert values[0] == values[1] == values[2] > 0


def test_sensitivity_of_layers_that_do_not_run_is_refused(x: Tensor) -> None:
    model = Tripled(nn.Linear(4, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="does not call Linear"):
        ActivationSensitivity(model, layers=["first", "unused"])(x)
    elsewhere = nn.Sequential(model.unused)
    elsewhere.forward = model.forward  # type: ignore[method-assign]  # runs none of its own
    with pytest.raises(ValueError, match="does not call Linear"):
        ActivationSensitivity(elsewhere)(x)
    with pytest.raises(ValueError, match="does not call any"):
        ActivationSensitivity(nn.Sequential(nn.Tanh()))(x)


def test_sensitivity_shows_its_layers_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert repr(ActivationSensitivity(model)) == "ActivationSensitivity()"
    shown = repr(ActivationSensitivity(model, 0.2, layers=[model[0], "2"], power=1, scale=None))
    assert shown == "ActivationSensitivity(radius=0.2, layers=['0', '2'], power=1, scale=None)"


def test_sensitivity_of_layers_without_a_batch_is_refused(x: Tensor) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1, keepdim=True) + self.layer(torch.ones(3)).sum()

    model = Strange()
    with pytest.raises(ValueError, match="first dimension holds the 10 examples"):
        ActivationSensitivity(model, layers=["layer"])(x)
