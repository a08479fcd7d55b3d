"""The papers' priors, each against its formula written out, or the explainer and penalty it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, differentiable, shared
from captum_priors.penalties import GraphLaplacian, energy_outside, gini, total_variation
from captum_priors.priors import (
    HINT,
    EnergyPrior,
    GraphPrior,
    PixelPrior,
    RightForTheRightReasons,
    RRRGradCAM,
    SparsityPrior,
)
from tests.asserts import assert_is, draw_alike, gradients_of
from tests.cases import DIFFERENTIATIONS, EXACT, Case, mlp, tuple_inputs

# The same float64 operations in another order.
ROUNDING = 1e-11

every_way = pytest.mark.parametrize("way", DIFFERENTIATIONS)
exactly = pytest.mark.parametrize("way", EXACT)


def _eg(penalty: Any, n: int) -> Callable[..., AttributionPrior]:
    def make(model: Any, way: Any, **options: Any) -> AttributionPrior:
        explainer = ExpectedGradients(model, differentiation=way)
        return AttributionPrior(explainer, penalty, **{"n_samples": n, **options})

    return make


def _energy(model: Any, way: Any, **options: Any) -> AttributionPrior:
    explainer = differentiable(InputXGradient(model), differentiation=way)
    return AttributionPrior(explainer, energy_outside, **options)


EDGES = torch.arange(100).reshape(10, 10).triu(1).double()
EDGES = EDGES + EDGES.T
SPELLED: dict[str, tuple[Callable[..., Any], Callable[..., AttributionPrior]]] = {
    "pixel": (PixelPrior, _eg(total_variation, 1)),
    "sparsity": (SparsityPrior, _eg(gini, 1)),
    "graph": (lambda m, **kw: GraphPrior(m, EDGES, **kw), _eg(GraphLaplacian(EDGES), 10)),
    "sparse graph": (
        lambda m, **kw: GraphPrior(m, EDGES.to_sparse(), **kw),
        _eg(GraphLaplacian(EDGES), 10),
    ),
    "energy": (EnergyPrior, _energy),
}


@every_way
@pytest.mark.parametrize("name", SPELLED)
def test_names_stand_for_an_explainer_and_a_penalty(name: str, way: Any) -> None:
    named, spelled = SPELLED[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 3))
    x, call = torch.randn(6, 1, 2, 5), {"target": 1}
    if name == "energy":
        call["annotation"] = torch.randint(2, (6, 2, 5))
    else:
        call["baselines"] = torch.randn(9, 1, 2, 5)
    for options in ({}, {"smooth": 20, "reduction": "sum", "n_samples": 3}):
        if name == "energy":
            options.pop("n_samples", None)
        prior = named(model, differentiation=way, **options)
        twin = spelled(model, way, **options)
        draw_alike(prior, twin)
        assert_is(prior(x, **call), twin(x, **call), model, ROUNDING)


@every_way
@pytest.mark.parametrize("make", [mlp, tuple_inputs])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_right_for_the_right_reasons(make: Callable[[], Case], way: Any, reduction: Any) -> None:
    case = make()
    several = case.inputs if isinstance(case.inputs, tuple) else (case.inputs,)
    leaves = tuple(t.clone().requires_grad_() for t in several)
    allowed = tuple(torch.randint(2, t.shape) for t in several)
    total = F.log_softmax(case.model(*leaves, *(case.args or ())), dim=1).sum()
    gradients = torch.autograd.grad(total, leaves, create_graph=True)
    pairs = zip(allowed, gradients, strict=True)
    expected = torch.stack([((1 - m) * g).square().sum() for m, g in pairs]).sum()
    prior = RightForTheRightReasons(case.model, differentiation=way, reduction=reduction)
    annotation = allowed if isinstance(case.inputs, tuple) else allowed[0]
    # All classes take part: the target is accepted and not used.
    value = prior(case.inputs, **case.call, annotation=annotation)
    weight = 1 / len(several[0]) if reduction == "mean" else 1
    # Central differences over 1 % of the point: truncation is (1e-2)^2, times the curvature.
    tolerance = ROUNDING if way in EXACT else 1e-2
    assert_is(value, weight * expected, case.model, ROUNDING, tolerance)


def _conv_net() -> nn.Sequential:
    """Eight by eight pixels in, a four by four layer, a nonlinear head."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, stride=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def _grad_cam(model: nn.Sequential, x: Tensor, target: int) -> Tensor:
    """Scaled to a maximum of one, where it is not zero."""
    activation = model[0](x)
    (gradient,) = torch.autograd.grad(
        model[1:](activation)[:, target].sum(), activation, create_graph=True
    )
    weights = gradient.mean((2, 3))
    cam = torch.einsum("bc,bchw->bhw", weights, activation).clamp_min(0).unsqueeze(1)
    top = torch.stack([m.max() for m in cam]).reshape(-1, 1, 1, 1)
    assert bool((top > 0).any())
    return cam / torch.where(top > 0, top, torch.ones_like(top))


@exactly
@pytest.mark.parametrize("dims", [3, 4])
def test_rrr_grad_cam(way: Any, dims: int) -> None:
    model, x = _conv_net(), torch.randn(5, 1, 8, 8)
    mask = torch.randint(2, (5, 1, 8, 8)).double()
    cam = _grad_cam(model, x, 1)
    expected = ((1 - F.avg_pool2d(mask, 2)) * cam).square().flatten(1).sum(1).mean()
    prior = RRRGradCAM(model, model[0], differentiation=way)
    value = prior(x, target=1, annotation=mask if dims == 4 else mask[:, 0].bool())
    assert_is(value, expected, model, ROUNDING)


@exactly
@pytest.mark.parametrize("side", [4, 8])
def test_hint(way: Any, side: int) -> None:
    model, x = _conv_net(), torch.randn(5, 1, 8, 8)
    wanted = torch.rand(5, 1, side, side)
    small = wanted if side == 4 else F.avg_pool2d(wanted, 2)
    expected = (small - _grad_cam(model, x, 1)).square().flatten(1).mean(1).mean()
    prior = HINT(model, model[0], differentiation=way)
    assert_is(prior(x, target=1, annotation=wanted), expected, model, ROUNDING)


def _of_images(cls: Any) -> tuple[Any, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3))
    prior = cls(model, model[0]) if cls in (RRRGradCAM, HINT) else cls(model)
    return prior, torch.randn(5, 3, 8, 8)


@pytest.mark.parametrize("cls", [RightForTheRightReasons, EnergyPrior, RRRGradCAM, HINT])
def test_annotations_of_images_have_one_rule(cls: Any) -> None:
    """Without channels, with one for all, and with one for each, the image's pixels or a map."""
    (prior, x), mask = _of_images(cls), torch.randint(2, (5, 1, 8, 8)).double()
    forms = [mask, mask[:, 0].bool(), mask.expand(5, 3, 8, 8)]
    one, without, each = (prior(x, target=1, annotation=form) for form in forms)
    torch.testing.assert_close(without, one)
    if cls is not EnergyPrior:  # which adds up what shares one value before it leaves out signs
        torch.testing.assert_close(each, one)
    shares = shared(mask[0].expand(3, 8, 8))
    same = prior(x, target=1, annotation=mask[:1].expand(5, 3, 8, 8))
    torch.testing.assert_close(prior(x, target=1, annotation=shares), same)


def test_a_coloured_annotation_counts_by_its_mean_where_maps_have_no_channels() -> None:
    (prior, x), mask = _of_images(RRRGradCAM), torch.randint(2, (5, 3, 8, 8)).double()
    found, expected = (prior(x, target=1, annotation=m) for m in (mask, mask.mean(1)))
    torch.testing.assert_close(found, expected)


def test_map_of_zeros_trains_without_nan() -> None:
    model, x = _conv_net(), torch.randn(5, 1, 8, 8)
    nn.init.zeros_(model[5].weight)
    value = HINT(model, model[0])(x, target=1, annotation=torch.ones(5, 1, 8, 8))
    assert value.item() == 1
    assert all(bool(g.isfinite().all()) for g in gradients_of(value, [*model.parameters()]))
