"""The papers' priors, each against its formula written out in torch primitives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_priors import differentiable, shared
from captum_priors.priors import (
    HINT,
    EnergyPrior,
    GraphPrior,
    PixelPrior,
    Prior,
    RightForTheRightReasons,
    RRRGradCAM,
    SparsityPrior,
)
from captum_priors.testing import check_differentiable
from tests.asserts import assert_same_numbers, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, mlp, tuple_inputs

# The same float64 operations in another order.
ROUNDING = 1e-11

every_way = pytest.mark.parametrize("way", DIFFERENTIATIONS)
exactly = pytest.mark.parametrize("way", EXACT)


def _gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(found, model.parameters(), strict=True)
    ]


def _assert_is(
    value: Tensor, expected: Tensor, model: nn.Module, way: str, tolerance: float = ROUNDING
) -> None:
    """Equal value and parameter gradient."""
    assert value.shape == ()
    assert_same_numbers(value, expected, tolerance)
    # Central differences over 1 % of the point: truncation is (1e-2)^2, times the curvature.
    tolerance = tolerance if way in EXACT else 1e-2
    assert relative_error(_gradients(value, model), _gradients(expected, model)) < tolerance


@every_way
def test_pixel_prior_of_a_linear_model(way: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 5, 3))
    x, background = torch.randn(6, 2, 4, 5), torch.randn(1, 2, 4, 5)
    # One reference row and a constant gradient: the draws do not matter.
    maps = (model[1].weight[2].reshape(2, 4, 5) * (x - background)).sum(1)
    maps = maps / maps.flatten(1).std(1, correction=0).reshape(-1, 1, 1)
    down = (maps[:, 1:] - maps[:, :-1]).abs().flatten(1).sum(1)
    right = (maps[:, :, 1:] - maps[:, :, :-1]).abs().flatten(1).sum(1)
    prior = PixelPrior(model, differentiation=way, baselines=background)
    # The floor of 1e-6 under a deviation of .1 changes the result by 5e-11.
    _assert_is(prior(x, target=2), (down + right).mean(), model, way, 1e-9)


@every_way
@pytest.mark.parametrize("sparse", [False, True])
def test_graph_prior_of_a_linear_model(way: Any, sparse: bool) -> None:
    model, x, background = nn.Linear(5, 3), torch.randn(6, 5), torch.randn(9, 5)
    adjacency = torch.rand(5, 5).triu(1)
    adjacency = adjacency + adjacency.T
    laplacian = torch.diag(adjacency.sum(1)) - adjacency
    importance = (model.weight[1] * (x - background.mean(0))).abs().mean(0)
    given = adjacency.to_sparse() if sparse else adjacency
    prior = GraphPrior(model, given, differentiation=way, baselines=background)
    _assert_is(prior(x, target=1), importance @ laplacian @ importance, model, way)


@every_way
def test_sparsity_prior_of_a_linear_model(way: Any) -> None:
    model, x, background = nn.Linear(5, 3), torch.randn(6, 5), torch.randn(1, 5)
    importance = (model.weight[1] * (x - background)).abs().mean(0)
    pairs = (importance.unsqueeze(0) - importance.unsqueeze(1)).abs()
    expected = -0.5 * pairs.mean() / importance.mean()
    prior = SparsityPrior(model, differentiation=way, baselines=background)
    _assert_is(prior(x, target=1), expected, model, way)


@pytest.mark.parametrize(
    "prior", [PixelPrior, SparsityPrior, lambda m, **kw: GraphPrior(m, torch.ones(4, 4), **kw)]
)
def test_expected_gradients_priors_take_options(prior: Callable[..., Prior]) -> None:
    case = mlp()
    few, many = (
        prior(case.model, n_samples=n, baselines=case.baselines).eval()(case.inputs, target=1)
        for n in (1, 50)
    )
    assert few.item() != many.item()
    again = prior(case.model, n_samples=50, baselines=case.baselines, smooth=20, reduction="sum")
    assert "n_samples=50" in repr(again)
    assert "reduction='sum', smooth=20.0" in repr(again)


def _log_probability_gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    total = F.log_softmax(model(leaf), dim=1).sum()
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    return gradient


@every_way
@pytest.mark.parametrize(("reduction", "weight"), [("mean", 1 / 5), ("sum", 1.0)])
def test_right_for_the_right_reasons(way: Any, reduction: Any, weight: float) -> None:
    case = mlp()
    allowed = torch.randint(2, case.inputs.shape)
    forbidden = 1 - allowed
    gradient = _log_probability_gradient(case.model, case.inputs)
    prior = RightForTheRightReasons(case.model, differentiation=way, reduction=reduction)
    value = prior(case.inputs, annotation=allowed)
    _assert_is(value, weight * (forbidden * gradient).square().sum(), case.model, way)
    # All classes take part: the target is accepted and not used.
    again = prior(case.inputs, target=case.target, annotation=allowed)
    assert again.item() == value.item()


def test_right_for_the_right_reasons_on_tuple_inputs() -> None:
    case = tuple_inputs()
    masks = tuple(torch.randint(2, t.shape) for t in case.inputs)
    leaves = tuple(t.clone().requires_grad_() for t in case.inputs)
    total = F.log_softmax(case.model(*leaves, *case.args), dim=1).sum()
    gradients = torch.autograd.grad(total, leaves, create_graph=True)
    expected = torch.stack(
        [((1 - m) * g).square().sum() for m, g in zip(masks, gradients, strict=True)]
    ).sum()
    value = RightForTheRightReasons(case.model)(
        case.inputs, additional_forward_args=case.args, annotation=masks
    )
    _assert_is(value, expected / 4, case.model, "double_backprop")


@every_way
def test_energy_prior(way: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4 * 4, 3))
    x, mask = torch.randn(5, 2, 6, 6), torch.randint(2, (5, 6, 6))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf, create_graph=True)
    positive = (x * gradient).sum(1).clamp_min(0)
    inside = (mask * positive).flatten(1).sum(1) / positive.flatten(1).sum(1)
    prior = EnergyPrior(model, differentiation=way)
    _assert_is(prior(x, target=1, annotation=mask), (1 - inside).mean(), model, way)


def _conv_net(activation: nn.Module | None = None) -> nn.Sequential:
    """Eight by eight pixels in, a four by four layer, a nonlinear head."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, stride=2),
        activation or nn.Softplus(),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def _grad_cam(model: nn.Sequential, x: Tensor, target: int) -> Tensor:
    activation = model[0](x)
    (gradient,) = torch.autograd.grad(
        model[1:](activation)[:, target].sum(), activation, create_graph=True
    )
    weights = gradient.mean((2, 3))
    return torch.einsum("bc,bchw->bhw", weights, activation).clamp_min(0).unsqueeze(1)


def _to_maximum_of_one(cam: Tensor) -> Tensor:
    top = torch.stack([m.max() for m in cam]).reshape(-1, 1, 1, 1)
    assert bool((top > 0).any())
    return cam / torch.where(top > 0, top, torch.ones_like(top))


def grad_cam(model: nn.Module, way: Any) -> Any:
    return differentiable(LayerGradCam(model, model[0]), differentiation=way)


@exactly
@pytest.mark.parametrize("activation", [nn.Softplus(), nn.ReLU()])
def test_grad_cam_has_the_values_of_captum(way: Any, activation: nn.Module) -> None:
    model, x = _conv_net(activation), torch.randn(5, 1, 8, 8)
    expected = LayerGradCam(model, model[0]).attribute(x, target=1, relu_attributions=True)
    found = grad_cam(model, way).attribute(x, target=1, relu_attributions=True)
    assert_same_numbers(found, expected, ROUNDING)
    assert_same_numbers(found, _grad_cam(model, x, 1), ROUNDING)


@exactly
def test_grad_cam_before_an_activation_in_place(way: Any) -> None:
    model, x = _conv_net(nn.ReLU()), torch.randn(5, 1, 8, 8)
    twin = _conv_net(nn.ReLU(inplace=True))
    twin.load_state_dict(model.state_dict())
    found = grad_cam(twin, way).attribute(x, target=1, relu_attributions=True)
    assert_same_numbers(found, _grad_cam(model, x, 1), ROUNDING)


@exactly
def test_grad_cam_is_certified(way: Any) -> None:
    model = _conv_net()
    explainer = grad_cam(model, way)
    x = torch.randn(5, 1, 8, 8).requires_grad_()
    found = check_differentiable(explainer, x, target=1, relu_attributions=True)
    assert found.passed


@exactly
@pytest.mark.parametrize("dims", [3, 4])
def test_rrr_grad_cam(way: Any, dims: int) -> None:
    model, x = _conv_net(), torch.randn(5, 1, 8, 8)
    mask = torch.randint(2, (5, 1, 8, 8)).double()
    cam = _to_maximum_of_one(_grad_cam(model, x, 1))
    expected = ((1 - F.avg_pool2d(mask, 2)) * cam).square().flatten(1).sum(1).mean()
    prior = RRRGradCAM(model, model[0], differentiation=way)
    value = prior(x, target=1, annotation=mask if dims == 4 else mask[:, 0].bool())
    _assert_is(value, expected, model, way)


@exactly
@pytest.mark.parametrize("side", [4, 8])
def test_hint(way: Any, side: int) -> None:
    model, x = _conv_net(), torch.randn(5, 1, 8, 8)
    wanted = torch.rand(5, 1, side, side)
    cam = _to_maximum_of_one(_grad_cam(model, x, 1))
    small = wanted if side == 4 else F.avg_pool2d(wanted, 2)
    expected = (small - cam).square().flatten(1).mean(1).mean()
    prior = HINT(model, model[0], differentiation=way)
    _assert_is(prior(x, target=1, annotation=wanted), expected, model, way)


@pytest.mark.parametrize("cls", [RightForTheRightReasons, EnergyPrior, RRRGradCAM, HINT])
def test_annotations_of_images_have_one_rule(cls: Any) -> None:
    """Without channels, with one for all, and with one for each, the image's pixels or a map."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3))
    x, mask = torch.randn(5, 3, 8, 8), torch.randint(2, (5, 1, 8, 8)).double()
    prior = cls(model, model[0]) if cls in (RRRGradCAM, HINT) else cls(model)
    forms = [mask, mask[:, 0].bool(), mask.expand(5, 3, 8, 8)]
    one, without, each = (prior(x, target=1, annotation=form) for form in forms)
    torch.testing.assert_close(without, one)
    if cls is not EnergyPrior:  # which adds up what shares one value before it leaves out signs
        torch.testing.assert_close(each, one)
    shares = shared(mask[0].expand(3, 8, 8))
    same = prior(x, target=1, annotation=mask[:1].expand(5, 3, 8, 8))
    torch.testing.assert_close(prior(x, target=1, annotation=shares), same)


def test_a_coloured_annotation_counts_by_its_mean_where_maps_have_no_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3))
    x, mask = torch.randn(5, 3, 8, 8), torch.randint(2, (5, 3, 8, 8)).double()
    prior = RRRGradCAM(model, model[0])
    torch.testing.assert_close(
        prior(x, target=1, annotation=mask), prior(x, target=1, annotation=mask.mean(1))
    )


def test_map_of_zeros_trains_without_nan() -> None:
    model, x = _conv_net(), torch.randn(5, 1, 8, 8)
    nn.init.zeros_(model[5].weight)
    wanted = torch.ones(5, 1, 8, 8)
    value = HINT(model, model[0])(x, target=1, annotation=wanted)
    assert value.item() == 1
    assert all(bool(g.isfinite().all()) for g in _gradients(value, model))


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "layer",
        lambda: HINT(_conv_net(), "0"),
        TypeError,
        r"`layer`: expected a torch\.nn\.Module, found str\. Pass model\.some_layer",
    ),
    (
        "differentiation",
        lambda: RRRGradCAM(_conv_net(), nn.ReLU(), differentiation="exact"),
        ValueError,
        r"`differentiation`: expected one of 'double_backprop', .*, found 'exact'",
    ),
    (
        "differentiation-of-pixels",
        lambda: PixelPrior(_conv_net(), differentiation="exact"),
        ValueError,
        r"`differentiation`: expected one of 'double_backprop', .*, found 'exact'",
    ),
    (
        "foreign-layer",
        lambda: HINT(_conv_net(), nn.ReLU())(
            torch.ones(2, 1, 8, 8), target=0, annotation=torch.ones(2, 1, 8, 8)
        ),
        ValueError,
        r"`layer`: expected a layer that runs in each forward pass, found one that does not\. Pass",
    ),
    (
        "adjacency",
        lambda: GraphPrior(nn.Linear(3, 1), torch.ones(2, 3)),
        ValueError,
        r"`adjacency`: expected a square matrix .*, found \(2, 3\)",
    ),
    (
        "mask",
        lambda: RightForTheRightReasons(nn.Linear(3, 2))(
            torch.ones(2, 3), annotation=torch.full((2, 3), 2)
        ),
        ValueError,
        r"`annotation`: expected values from 0 .*, found annotation\[0, 0\] = 2",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD]
)
def test_bad_input_gives_one_clear_error(
    call: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


def test_grad_cam_of_a_flat_layer_is_refused() -> None:
    model = _conv_net()
    text = r"`layer`: expected a layer that returns one tensor \(batch, channels, \.\.\.\), found "
    with pytest.raises(
        ValueError, match=text + r"maps of shape \(2, 1\)\. Pass a convolutional layer"
    ):
        HINT(model, model[3])(torch.ones(2, 1, 8, 8), target=0, annotation=torch.ones(2, 1, 8, 8))


def test_right_for_the_right_reasons_needs_two_classes() -> None:
    """The log-probability of the only class is 0 everywhere: a prior without effect."""
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="at least two classes"):
        RightForTheRightReasons(nn.Linear(4, 1))(x, annotation=torch.zeros(3, 4))
