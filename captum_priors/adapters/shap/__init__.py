"""SHAP's explainers, made differentiable.

SHAP's own code runs, on a copy of the explainer, wherever it decides or draws; what it asks of the
model is answered by torch with its graph, and what it makes of the answers is made again of
tensors. ``shap`` is imported when the first explainer is adapted.
"""

import functools
from typing import Any

from captum_priors._errors import NotDifferentiableError
from captum_priors._types import Differentiation
from captum_priors.adapters.shap.adapter import ShapAdapter
from captum_priors.adapters.shap.deep import DeepAdapter
from captum_priors.adapters.shap.gradient import GradientAdapter
from captum_priors.adapters.shap.kernel import KernelAdapter, SamplingAdapter
from captum_priors.adapters.shap.linear import AdditiveAdapter, LinearAdapter
from captum_priors.adapters.shap.masked import (
    ExactAdapter,
    PartitionAdapter,
    PermutationAdapter,
    WinterAdapter,
)
from captum_priors.adapters.shap.model import imported

__all__ = ["ROWS", "ShapAdapter", "adapter_of", "is_shap"]

ROWS: dict[str, type[ShapAdapter]] = {
    "GradientExplainer": GradientAdapter,
    "DeepExplainer": DeepAdapter,
    "KernelExplainer": KernelAdapter,
    "SamplingExplainer": SamplingAdapter,
    "PermutationExplainer": PermutationAdapter,
    "ExactExplainer": ExactAdapter,
    "PartitionExplainer": PartitionAdapter,
    "CoalitionExplainer": WinterAdapter,
    "AdditiveExplainer": AdditiveAdapter,
    "LinearExplainer": LinearAdapter,
}

_TREES = "walks the splits of trees, and there is no torch model behind it"
_REFUSED = {
    "TreeExplainer": _TREES,
    "GPUTreeExplainer": _TREES,
    "LimeTabular": "selects features on arrays; captum.attr.Lime is adapted",
    "Explainer": "only chooses one of the others; pass what shap.Explainer(...) makes",
}


def is_shap(cls: type) -> bool:
    """Whether a class is one of SHAP's, told without importing SHAP, or adapts one."""
    return issubclass(cls, ShapAdapter) or any(
        base.__module__.partition(".")[0] == "shap" for base in cls.__mro__
    )


def adapter_of(explainer: Any, differentiation: Differentiation | None, model: Any) -> Any:
    """Make a SHAP explainer, or class of explainers, differentiable."""
    if isinstance(explainer, type):
        return explainer if issubclass(explainer, ShapAdapter) else _class_for(explainer)  # type: ignore[arg-type]  # classes are hashable
    if isinstance(explainer, ShapAdapter):
        if model is None and differentiation in (None, explainer.differentiation):
            return explainer
        model = explainer.given if model is None else model
        differentiation = differentiation or explainer.differentiation
        explainer = explainer.explainer
    adapter = _row_of(type(explainer))
    return adapter(explainer, model, differentiation or "double_backprop")


@functools.cache
def _class_for(stock: Any) -> type:
    """Make the class of adapters that make their explainer themselves."""
    adapter: Any = _row_of(stock)

    def init(self: Any, *args: Any, **options: Any) -> None:
        adapter.__init__(self, stock(*args, **options), None, "double_backprop")

    return type(f"Differentiable{stock.__name__}", (adapter,), {"__init__": init})


def _row_of(cls: type) -> type[ShapAdapter]:
    """Find the adapter of a class, or of one that SHAP made for a single explainer."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != "shap":
            break  # a user's subclass may override the very step that is done again
        if base.__name__ in ROWS and base is getattr(imported(), base.__name__, None):
            return ROWS[base.__name__]
    reason = _REFUSED.get(
        cls.__name__, "is not one of them; a subclass may override what is done again on tensors"
    )
    raise NotDifferentiableError(
        f"`explainer`: expected one of SHAP's that explains a torch model ({', '.join(ROWS)}), "
        f"found {cls.__name__}, which {reason}. Use one of these, or register a conversion of your "
        "own with differentiable.register and certify it with "
        "captum_priors.testing.check_differentiable."
    )
