"""The tables that the laws of the whole package run over, through public names alone.

A new regularizer, prior or explainer joins with one row.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import captum.attr as ca
import pytest
import torch
from captum.robust import FGSM
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    NotDifferentiableError,
    StabilityPrior,
    differentiable,
)
from captum_priors.attacks import RandomAttack
from captum_priors.distances import mse
from captum_priors.penalties import l2
from captum_priors.priors import (
    HINT,
    AgreementPrior,
    Comprehensiveness,
    ConceptPrior,
    EnergyPrior,
    PixelPrior,
    RightForTheRightReasons,
    RobustRightReasons,
    RRRGradCAM,
    Sufficiency,
    Term,
)
from captum_priors.stability import (
    ATEX,
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
from tests.adapters.captum_table import ROWS as CAPTUM

# What a refusal may be. Errors of torch's own, such as a shape that does not fit, are not among it.
REFUSALS = (NotDifferentiableError, ValueError, TypeError)
WAYS = ("double_backprop", "recompute", "finite_difference")
FEATURES, CLASSES = 5, 3


def options_of(cls: Any) -> dict[str, Any]:
    """The options of a class with their defaults, also those that open keywords stand for."""
    makers = [vars(c)["__init__"] for c in cls.__mro__ if "__init__" in vars(c)]
    declared = [p for make in reversed(makers) for p in inspect.signature(make).parameters.values()]
    defaults = {p.name: p.default for p in declared if p.default is not p.empty}
    names: set[str] = set()
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.add(parameter.name)
        elif parameter.name != "attribute_options":  # Unpack[...], or any that a term has
            (typed,) = get_args(parameter.annotation) or (None,)
            names.update(typed.__annotations__ if typed else inspect.signature(Term).parameters)
    return {name: default for name, default in defaults.items() if name in names}


def net(out: int = CLASSES) -> nn.Module:
    """A smooth classifier of five features."""
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, out))


class Around(nn.Module):
    """Something around a model, which is asked for the parts of the model as the model is."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def __getitem__(self, i: int) -> Any:
        return self.inner[i]


class Both(Around):
    """A network that runs twice, once for each of two inputs, and weighs what it says of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.clone()) - 0.5 * self.inner(x)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES))


@dataclass(frozen=True)
class Leaf:
    """A prior that is no combination of others."""

    name: str
    make: Callable[..., Any]  # of a model, with options
    cls: Any = None  # whose signature has the options
    stacks: bool = True  # whether several copies of the batch go through the model at once
    draws: bool = True
    labels: bool = False  # whether the target is class labels
    annotated: bool = False
    images: bool = False
    ways: tuple[str, ...] = ("double_backprop",)
    frozen: tuple[tuple[str, Any], ...] = ()  # options that the row sets
    needs: tuple[tuple[str, Any], ...] = ()  # options that have no default

    def model(self) -> nn.Module:
        return conv() if self.images else net()

    def batch(self, n: int = 4) -> Tensor:
        return torch.randn(n, 1, 4, 4) if self.images else torch.randn(n, FEATURES)

    def call(self, x: Tensor, rows: Any = slice(None)) -> dict[str, Any]:
        """Keywords of a call on these rows of a batch."""
        n = len(x)
        call: dict[str, Any] = {"target": (torch.arange(n) % CLASSES)[rows]}
        if self.annotated:
            mask = (torch.arange(x.numel()).reshape(x.shape) % 3 > 0).to(x.dtype)
            call["annotation"] = mask[rows]
        return call


_ASCENT = {"step_num": 2, "attack_n_steps": 2, "radius": 0.2, "step_size": 0.15}
_PATH = {**_ASCENT, "n_steps": 4}
_TWO = ("double_backprop", "finite_difference")
_OF_CLASS: dict[str, Any] = {"labels": True, "ways": _TWO}
_OF_LOSS: dict[str, Any] = {"draws": False, **_OF_CLASS}
_RANKING: dict[str, Any] = {"needs": (("top_k", 2),), "draws": False, "ways": _TWO}


def regularizer(name: str, cls: Any, options: dict[str, Any], **flags: Any) -> Leaf:
    known = options_of(cls)

    def make(model: Any, **more: Any) -> Any:  # with those of the options that it has
        given = {name: value for name, value in {**options, **more}.items() if name in known}
        return cls(model, **dict(flags.get("needs", ())), **given)

    return Leaf(name, make, cls, frozen=tuple(options.items()), **flags)


def explained(name: str, make: Callable[[Any, str], Any], **flags: Any) -> Leaf:
    """An attribution prior on an explainer of the model."""
    call = flags.pop("call", {})

    def prior(model: Any, differentiation: str = "double_backprop", **more: Any) -> Any:
        explainer = make(model, differentiation)
        return AttributionPrior(explainer, l2, **call, **more)

    return Leaf(name, prior, AttributionPrior, ways=WAYS, **flags)


def named(
    name: str, cls: Any, *, layer: int | None = None, ways: tuple[str, ...] = WAYS, **flags: Any
) -> Leaf:
    def make(model: Any, **options: Any) -> Any:
        return cls(model, *([] if layer is None else [model[layer]]), **options)

    return Leaf(name, make, cls, ways=ways, **flags)


def background(n: int = 6) -> Tensor:
    return torch.linspace(-9, 9, n * FEATURES, dtype=torch.float64).sin().reshape(n, FEATURES)


def noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def stable(name: str, cls: Any, perturbing: Callable[[Any], Any], **flags: Any) -> Leaf:
    """A stability prior on an explainer of the model."""
    call = flags.pop("call", {})

    def prior(model: Any, differentiation: Any = "double_backprop", **options: Any) -> Any:
        explainer = differentiable(cls(model), differentiation=differentiation)
        return StabilityPrior(explainer, mse, perturbing(model), **call, **options)

    return Leaf(name, prior, StabilityPrior, stacks=False, ways=WAYS, **flags)


def climb(model: Any) -> Any:
    return lambda x, target=None: FGSM(model).perturb(x, 0.1, target)


def _concept(model: Any, layer: int, **options: Any) -> Any:
    direction = torch.tensor([0.6, -0.8, *[0.0] * 5])
    return ConceptPrior(model, model[layer], direction[: 2 if layer == 0 else 7], **options)


def _random_concept(model: Any, **options: Any) -> Any:
    return _concept(model, 0, **{"target": "random", "form": "square", **options})


def _pixel(model: Any, **options: Any) -> Any:
    return PixelPrior(model, **{"baselines": background(), **options})


def _agreement(model: Any, differentiation: str = "double_backprop", **options: Any) -> Any:
    a, b = (
        differentiable(cls(model), differentiation=differentiation)
        for cls in (ca.Saliency, ca.IntegratedGradients)
    )
    given = {"options_a": {"abs": False}, "options_b": {"n_steps": 4}}
    return AgreementPrior(a, b, **{**given, **options})


REGULARIZERS = [
    regularizer("ATEX", ATEX, {"n_samples": 2, "radius": 0.3}),
    regularizer("Hessian", HessianPenalty, {"n_samples": 2}, stacks=False),
    regularizer("Hessian-difference", HessianPenalty, {"n_samples": 2, "curvature": "difference"}),
    regularizer("Hessian-twice", HessianPenalty, {"n_samples": 2, "curvature": "difference_twice"}),
    regularizer("Sensitivity", ActivationSensitivity, {"n_samples": 2}),
    regularizer("Jacobian", JacobianRegularization, {"n_samples": 2}, ways=_TWO),
    regularizer("Jacobian-exact", JacobianRegularization, {"n_samples": None}, draws=False),
    regularizer("InputGradient", InputGradientRegularization, {}, stacks=False, **_OF_LOSS),
    regularizer("CURE", CurvatureRegularization, {"step_size": 0.5}, **_OF_LOSS),
    regularizer("R2ET", R2ET, {"step_size": 0.5}, **_RANKING),
    regularizer("R2ET-gap", R2ET, {"curvature": 0.0}, stacks=False, **_RANKING),
    regularizer("SSR", SmoothSurface, {}, draws=False, ways=_TWO),
    regularizer("SGT", SaliencyGuided, {}),
    regularizer("IG-NORM", RobustAttribution, _PATH, **_OF_CLASS),
    regularizer(
        "IG-SUM-NORM", RobustAttribution, {**_PATH, "objective": "ig_sum_norm"}, **_OF_CLASS
    ),
    regularizer("ART", AttributionAlignment, {**_ASCENT, "top_k": 3}, **_OF_CLASS),
]
EXPLAINED = [
    explained(
        "EG-1",
        lambda m, way: ExpectedGradients(m, differentiation=way),
        call={"n_samples": 1, "baselines": background()},
        stacks=False,
    ),
    explained(
        "EG-3",
        lambda m, way: ExpectedGradients(m, differentiation=way),
        call={"n_samples": 3, "baselines": background(), "stdevs": 0.1},
    ),
    explained(
        "LayerEG",
        lambda m, way: LayerExpectedGradients(m, m[1], differentiation=way),
        call={"n_samples": 2, "baselines": background()},
    ),
    explained(
        "LayerEG-two-runs",
        lambda m, way: LayerExpectedGradients(Both(m), m[1], differentiation=way),
        call={"n_samples": 2, "baselines": background()},
    ),
    explained(
        "Saliency",
        lambda m, way: differentiable(ca.Saliency(m), differentiation=way),
        call={"abs": False},
        stacks=False,
        draws=False,
    ),
    explained(
        "IG",
        lambda m, way: differentiable(ca.IntegratedGradients(m), differentiation=way),
        call={"n_steps": 4},
        draws=False,
    ),
]


STABLE = [
    stable(
        "Stability-confined",
        ca.InputXGradient,
        lambda m: RandomAttack(radius=0.2, keep_prediction=False),
        annotated=True,
    ),
    stable("Stability", ca.Saliency, lambda m: noise, call={"abs": False}),
    stable("Stability-FGSM", ca.InputXGradient, climb, draws=False),
]
_WHOLE: dict[str, Any] = {"stacks": False, "ways": WAYS}
_MASKED: dict[str, Any] = {"annotated": True, "draws": False, "stacks": False}


def robust(attack: str) -> Leaf:
    def make(model: Any, **options: Any) -> Any:
        return RobustRightReasons(model, **{"radius": 0.2, "attack": attack, **options})

    flags: dict[str, Any] = {"annotated": True, "labels": True, "stacks": False, "ways": _TWO}
    needs = (("radius", 0.2),)
    return Leaf(f"R4-{attack}", make, RobustRightReasons, needs=needs, **flags)


def erasing(cls: Any, form: str) -> Leaf:
    def make(model: Any, **options: Any) -> Any:
        return cls(model, **{"form": form, "margin": 1.0, **options})

    return Leaf(f"{cls.__name__}-{form}", make, cls, annotated=True, labels=True, draws=False)


NAMED = [
    erasing(Comprehensiveness, "probability"),
    erasing(Comprehensiveness, "log"),
    erasing(Sufficiency, "probability"),
    erasing(Sufficiency, "log"),
    robust("random"),
    robust("pgd"),
    named("RRR", RightForTheRightReasons, **_MASKED),
    named("Energy", EnergyPrior, **_MASKED),
    named("HINT", HINT, layer=0, images=True, ways=WAYS[:2], **_MASKED),
    named("RRR-CAM", RRRGradCAM, layer=0, images=True, ways=WAYS[:2], **_MASKED),
    Leaf("Pixel", _pixel, PixelPrior, stacks=False, ways=WAYS),
    Leaf("Concept", partial(_concept, layer=1), ConceptPrior, draws=False, **_WHOLE),
    Leaf("Concept-maps-random", _random_concept, ConceptPrior, images=True, **_WHOLE),
    Leaf("Agreement", _agreement, AgreementPrior, draws=False, ways=WAYS),
]
LEAVES = [*REGULARIZERS, *EXPLAINED, *STABLE, *NAMED]
LEAVES_AND_WAYS = [(leaf, way) for leaf in LEAVES for way in leaf.ways]


def leaves_but(*names: str) -> Any:
    """Parametrise over the leaves, without those that the law does not speak of."""
    return pytest.mark.parametrize(
        "leaf", [leaf for leaf in LEAVES if leaf.name not in names], ids=lambda leaf: leaf.name
    )


def leaves_and_ways_but(*names: str) -> Any:
    """Parametrise over the leaves and their ways of differentiating, without these."""
    pairs = [
        pytest.param(leaf, way, id=f"{leaf.name}-{way}")
        for leaf, way in LEAVES_AND_WAYS
        if leaf.name not in names
    ]
    return pytest.mark.parametrize(("leaf", "way"), pairs)


every_leaf, every_leaf_and_way = leaves_but(), leaves_and_ways_but()


def those(**flags: Any) -> Any:
    """Parametrise over the leaves with these flags."""
    fit = [leaf for leaf in LEAVES if all(getattr(leaf, k) == v for k, v in flags.items())]
    return pytest.mark.parametrize("leaf", fit, ids=lambda leaf: leaf.name)


def way_options(leaf: Leaf, way: str) -> dict[str, str]:
    """The option that asks for this differentiation, where the leaf has it."""
    return {"differentiation": way} if len(leaf.ways) > 1 else {}


# Captum's classes that differentiate the output of the model: all but perturbations and what
# stops at a layer or neuron.
_NO_GRADIENT = ("Feature", "Occlusion", "Shapley", "KernelShap", "Lime", "LLM", "DataLoader")
GRADIENT_ROWS = [
    name
    for name, row in CAPTUM.items()
    if row.target and not any(word in name for word in _NO_GRADIENT)
]
every_gradient_row = pytest.mark.parametrize("name", GRADIENT_ROWS)
