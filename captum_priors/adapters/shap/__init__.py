"""SHAP's explainers, made differentiable.

SHAP's own code runs, on a copy of the explainer, wherever it decides or draws; what it asks of the
model is answered by torch with its graph, and what it makes of the answers is made again of
tensors. ``shap`` is imported when the first explainer is adapted.
"""

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from captum_priors._errors import NotDifferentiableError
from captum_priors._types import Differentiation
from captum_priors.adapters.shap.adapter import ShapAdapter
from captum_priors.adapters.shap.deep import DeepAdapter
from captum_priors.adapters.shap.gradient import GradientAdapter
from captum_priors.adapters.shap.kernel import KernelAdapter
from captum_priors.adapters.shap.linear import AdditiveAdapter, LinearAdapter
from captum_priors.adapters.shap.masked import (
    ExactAdapter,
    PartitionAdapter,
    PermutationAdapter,
    WinterAdapter,
)
from captum_priors.adapters.shap.model import imported
from captum_priors.adapters.shap.sampling import SamplingAdapter

__all__ = ["ROWS", "ShapAdapter", "adapter_of", "is_shap", "shap_refusal"]


@dataclass(frozen=True)
class Row:
    """One admitted explainer: its class in SHAP, its adapter, and what the documentation says."""

    name: str
    adapter: type[ShapAdapter]
    mechanism: str
    held_fixed: str

    @property
    def differentiations(self) -> tuple[str, ...]:
        """The ways in which its parameter gradient can be taken."""
        return self.adapter.differentiations


_LINEAR = "linear in coalition values"
ROWS: dict[str, Row] = {
    name: Row(name, *row)
    for name, row in {
        "GradientExplainer": (
            GradientAdapter,
            "draws of SHAP's loop, gradients by the engine",
            "draws",
        ),
        "DeepExplainer": (
            DeepAdapter,
            "rescale rule as derivative of stand-in activations",
            "nothing",
        ),
        "KernelExplainer": (
            KernelAdapter,
            "least squares of SHAP's run, solved on tensors",
            "sampled coalitions, selected features",
        ),
        "SamplingExplainer": (
            SamplingAdapter,
            "SHAP's samples, correction on tensors",
            "samples and their numbers",
        ),
        "PermutationExplainer": (PermutationAdapter, _LINEAR, "permutations"),
        "ExactExplainer": (ExactAdapter, _LINEAR, "nothing"),
        "PartitionExplainer": (PartitionAdapter, _LINEAR, "expanded part of the tree"),
        "CoalitionExplainer": (WinterAdapter, _LINEAR, "nothing"),
        "AdditiveExplainer": (AdditiveAdapter, "differences of recorded outputs", "nothing"),
        "LinearExplainer": (
            LinearAdapter,
            "coefficients read off the module",
            "orders of imputed features",
        ),
    }.items()
}

_TREES = "walks the splits of trees, and there is no torch model behind it"
_FOREST = "fits a forest to the answers, which has no derivative"
_REFUSED = {
    "TreeExplainer": _TREES,
    "GPUTreeExplainer": _TREES,
    "TreeGain": "returns numbers that a tree stores",
    "Coefficient": "returns numbers that a linear model stores",
    "Maple": _FOREST,
    "TreeMaple": _FOREST,
    "Random": "returns random numbers that do not depend on the model",
    "LimeTabular": "is the lime package's, which selects features on arrays; captum.attr.Lime is "
    "adapted",
    "Explainer": "only chooses one of the others; pass what shap.Explainer(...) makes",
}


def is_shap(cls: type) -> bool:
    """Whether a class is SHAP's, or derives from one, told without importing SHAP; or adapts one."""
    return issubclass(cls, ShapAdapter) or any(
        base.__module__.partition(".")[0] == "shap" for base in cls.__mro__
    )


def adapter_of(explainer: Any, differentiation: Differentiation | None, model: Any) -> Any:
    """Make a SHAP explainer, or class of explainers, differentiable."""
    if isinstance(explainer, type):
        return explainer if issubclass(explainer, ShapAdapter) else _class_for(explainer)
    if isinstance(explainer, ShapAdapter):
        if model is None and differentiation in (None, explainer.differentiation):
            return explainer
        model = explainer.given if model is None else model
        differentiation = differentiation or explainer.differentiation
        explainer = explainer.explainer
    adapter = _row_of(type(explainer)).adapter
    return adapter(explainer, model, differentiation or "double_backprop")


@functools.cache
def _class_for(stock: Any) -> type:
    """Make the class of adapters that make their explainer themselves."""
    row = _row_of(stock)

    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807  # of the class below
        held = args[0] if args else options.get("model")
        module = held[0] if isinstance(held, tuple) else held
        modules = list(module.modules()) if isinstance(module, nn.Module) else []
        modes = [m.training for m in modules]
        try:
            explainer = stock(*args, **options)
        finally:  # SHAP leaves modules in evaluation mode
            for m, mode in zip(modules, modes, strict=True):
                m.training = mode
        row.adapter.__init__(self, explainer)

    doc = f":class:`shap.{row.name}` with its graph."
    return type(f"Differentiable{row.name}", (row.adapter,), {"__init__": __init__, "__doc__": doc})


def _row_of(cls: type) -> Row:
    """Find the row of a class, or of one that SHAP made for a single explainer."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != "shap":
            break  # a user's subclass may override the very step that is done again
        if base.__name__ in ROWS and base is getattr(imported(), base.__name__, None):
            return ROWS[base.__name__]
    raise NotDifferentiableError(shap_refusal(cls))


def shap_refusal(cls: type) -> str:
    """Word the error for an explainer without a conversion."""
    reason = _REFUSED.get(
        cls.__name__, "is not one of them; a subclass may override what is done again on tensors"
    )
    return (
        f"`explainer`: expected one of SHAP's that explains a torch model ({', '.join(ROWS)}), "
        f"found {cls.__name__}, which {reason}. Use one of these, or register a conversion of your "
        "own with differentiable.register and certify it with "
        "captum_priors.testing.check_differentiable."
    )
