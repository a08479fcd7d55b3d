"""The repr is the formula: it shows every option that is not its default, and can be read back."""

import re
import typing
from functools import partial
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Guarded,
    Lazy,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.distances import SoftTopK, mse
from captum_priors.penalties import alignment, l1, l2, total_variation
from captum_priors.priors import (
    HINT,
    AgreementPrior,
    ConceptPrior,
    GraphPrior,
    RRRGradCAM,
    SparsityPrior,
    Term,
)
from captum_priors.priors.combined import SumPrior, WeightedPrior
from captum_priors.stability import smooth_activations
from tests.laws.leaves import LEAVES, background, net, options_of

# Other values of options whose default does not say what else there is.
OTHER: dict[str, Any] = {
    "layers": ["1"],
    "lower_bound": -3.0,
    "margin": 0.5,
    "n_nearest": 3,
    "n_samples": 3,
    "name": "plain",
    "options_a": {"abs": False},
    "options_b": {"n_steps": 5},
    "positions": (-1.0, 0.0),
    "radius": 0.123,
    "scale": None,
    "smooth": 7.0,
    "step_size": 0.0123,
    "upper_bound": 3.0,
}
CLASSES = {leaf.cls: leaf for leaf in LEAVES if leaf.cls not in (AttributionPrior, StabilityPrior)}
MORE = {  # with what they are made of, besides a model
    SparsityPrior: (),
    GraphPrior: (torch.ones(5, 5) - torch.eye(5),),
}
WITH = {**MORE, ConceptPrior: (torch.ones(7),)}
HELD = ("explainer", "teacher")  # objects, which a formula names and cannot write out


def another(cls: Any, name: str, default: Any) -> Any:
    """A value of an option that is not its default."""
    if name in OTHER:
        return OTHER[name]
    if name == "differentiation":
        ways = CLASSES[cls].ways if cls in CLASSES else ()
        return ways[-1] if len(ways) > 1 else "finite_difference"
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1 if default != 2 else 1
    if isinstance(default, float):
        return default / 2 + 0.1
    hint = {**typing.get_type_hints(Term.__init__), **typing.get_type_hints(cls.__init__)}.get(name)
    words = [word for word in _words(hint) if word != default]
    assert words, f"no other value is known of {cls.__name__}({name}={default!r}): add one to OTHER"
    return words[0]


def _words(hint: Any) -> list[Any]:
    nested = [_words(a) if typing.get_args(a) else [a] for a in typing.get_args(hint)]
    return [word for words in nested for word in words if isinstance(word, (str, int))]


def build(cls: Any, model: nn.Module, **options: Any) -> Any:
    if cls is AgreementPrior:
        return cls(ca.Saliency(model), ca.IntegratedGradients(model), **options)
    layer = [model[0]] if cls in (HINT, RRRGradCAM, ConceptPrior) else []
    extra = {} if cls not in MORE else {"baselines": background()}
    if cls in CLASSES:
        extra = dict(CLASSES[cls].needs)
    return cls(model, *layer, *WITH.get(cls, ()), **{**extra, **options})


ROWS = [
    pytest.param(cls, name, default, id=f"{cls.__name__}-{name}")
    for cls in [*CLASSES, *MORE]
    for name, default in options_of(cls).items()
    if name not in HELD
]


class Named(str):
    """Something that a prior is made of besides a model and options: it stands for itself."""

    def __call__(self, *args: Any, **options: Any) -> "Named":
        return self


class Names(dict[str, Any]):
    """What a formula names."""

    def __missing__(self, name: str) -> Named:
        return Named(name)


def read(text: str, model: Any) -> Any:
    """Make a prior of its formula, in which the model may be left out."""

    def maker(cls: Any) -> Any:
        return lambda *args, **options: build(cls, model, **options)

    return eval(text, {}, Names({cls.__name__: maker(cls) for cls in [*CLASSES, *MORE]}))


@pytest.mark.parametrize(("cls", "name", "default"), ROWS)
def test_options_show_and_can_be_read(cls: Any, name: str, default: Any) -> None:
    model = CLASSES[cls].model() if cls in CLASSES else net()
    value = another(cls, name, default)
    prior = build(cls, model, **{name: value})
    assert repr(prior) != repr(build(cls, model))
    assert re.search(rf"\b{name}={re.escape(repr(value))}", repr(prior)), repr(prior)
    again = read(repr(prior), model)
    assert repr(again) == repr(prior)
    for each in (again, prior):
        assert getattr(each, name, value) == value


@pytest.mark.parametrize("cls", [*CLASSES, *MORE])
def test_what_is_no_option_is_refused(cls: Any) -> None:
    model = CLASSES[cls].model() if cls in CLASSES else net()
    for name in {"colour", "missing"} - options_of(cls).keys():
        with pytest.raises(TypeError, match=f"unexpected .*'{name}'|`{name}`: expected an option"):
            build(cls, model, **{name: "nan"})


def base(**options: Any) -> AttributionPrior:
    return AttributionPrior(ExpectedGradients(net()), l2, baselines=background(), **options)


def test_combinations_can_be_read() -> None:
    names = {
        "AttributionPrior": AttributionPrior,
        "ExpectedGradients": ExpectedGradients(net()),
        "Guarded": Guarded,
        "Lazy": Lazy,
        "Subsample": Subsample,
        "SumPrior": SumPrior,
        "WeightedPrior": WeightedPrior,
        "l2": l2,
        "tensor": lambda *shape: background(shape[0]),
    }
    for prior in (
        base(n_samples=3, stdevs=(0.1,), estimator="monte_carlo", internal_batch_size=7),
        1 / 3 * base(name="plain"),
        1e-7 * (base() + 0.1 * base(smooth=1 / 3)),
        Subsample(base(), 1 / 3),
        Lazy(Guarded(base(), "skip", max_value=10 / 3), 4),
        Lazy(Guarded(Subsample(base(), 0.5, name="a"), name="b"), 2, name="c"),
        3 * WeightedPrior(2, base(), name="a"),
        2 * SumPrior([base()], name="a") + base(),
        SumPrior([base(), SumPrior([base()], name="b")], name="a"),
    ):
        again = eval(repr(prior), names)
        assert repr(again) == repr(prior)
    weighted = eval(repr(1 / 3 * base()), names)
    assert weighted.weight == 1 / 3
    assert eval(repr(Subsample(base(), 1 / 3)), names).fraction == 1 / 3


def eg(**options: Any) -> Any:
    return AttributionPrior(ExpectedGradients(net(), **options), l2, baselines=background())


def ig(**options: Any) -> Any:
    way = {k: options.pop(k) for k in ("differentiation",) if k in options}
    return AttributionPrior(differentiable(ca.IntegratedGradients(net(), **options), **way), l2)


def stable(perturbation: Any, distance: Any = mse) -> Any:
    return StabilityPrior(ca.Saliency(net()), distance, perturbation)


def attack(**options: Any) -> Any:
    return TopKAttack(ca.Saliency(net()), **{"k": 2, "radius": 0.1, **options})


PAIRS: dict[str, tuple[Any, Any]] = {
    "EG-multiply": (eg(), eg(multiply_by_inputs=False)),
    "EG-way": (eg(), eg(differentiation="recompute")),
    "IG-multiply": (ig(), ig(multiply_by_inputs=False)),
    "IG-way": (ig(), ig(differentiation="recompute")),
    "penalty": (
        AttributionPrior(ca.Saliency(net()), partial(total_variation, standardize=False)),
        AttributionPrior(ca.Saliency(net()), total_variation),
    ),
    "measure": (
        AttributionPrior(ca.Saliency(net()), partial(alignment, measure="mse")),
        AttributionPrior(ca.Saliency(net()), alignment),
    ),
    "distance": (stable(l1, SoftTopK(2)), stable(l1, SoftTopK(3))),
    "attack-k": (stable(attack()), stable(attack(k=3))),
    "attack-radius": (stable(attack()), stable(attack(radius=0.2))),
    "attack-steps": (stable(attack()), stable(attack(step_num=7))),
    "attack-norm": (stable(attack()), stable(attack(norm="L2"))),
    "noise": (
        stable(RandomAttack(radius=0.1, keep_prediction=False)),
        stable(RandomAttack(radius=0.2, keep_prediction=False)),
    ),
    "smooth": (smooth_activations(net(), 0.1234567), smooth_activations(net(), 0.1234568)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_other_options_have_another_name(pair: tuple[Any, Any]) -> None:
    assert repr(pair[0]) != repr(pair[1])


@pytest.mark.parametrize("name", ["", "  ", 3, b"few"])
def test_names_are_words(name: Any) -> None:
    with pytest.raises(ValueError, match=r"`name`: expected a word, or None, found"):
        base(name=name)
