"""The table of SHAP's explainers: what is adapted and how, and why the others are refused."""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from captum_priors._errors import NotDifferentiableError
from captum_priors._types import Differentiation
from captum_priors.adapters._shap._adapter import ShapAdapter
from captum_priors.adapters._shap._additive import AdditiveFamily
from captum_priors.adapters._shap._coalition_adapters import (
    ExactFamily,
    PartitionFamily,
    PermutationFamily,
    WinterFamily,
)
from captum_priors.adapters._shap._deep import DeepFamily
from captum_priors.adapters._shap._door import shap
from captum_priors.adapters._shap._gradient import GradientFamily
from captum_priors.adapters._shap._kernel import KernelFamily
from captum_priors.adapters._shap._linear import LinearFamily
from captum_priors.adapters._shap._sampling import SamplingFamily


@dataclass(frozen=True)
class Row:
    """One admitted explainer.

    Attributes:
        name: Its class in ``shap``.
        family: The base of its adapter.
        mechanism: How its numbers get their graph.
        held_fixed: What the gradient takes as constant.
        options: What ``attribute`` takes besides inputs and target, with its defaults.
    """

    name: str
    family: type[ShapAdapter]
    mechanism: str
    held_fixed: str
    options: dict[str, Any]

    @property
    def differentiations(self) -> tuple[str, ...]:
        """Return the ways in which its parameter gradient can be taken."""
        return self.family.differentiations


_EVALS = {"batch_size": "auto", "silent": True}
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            "GradientExplainer",
            GradientFamily,
            "draws of SHAP's loop, gradients by the engine",
            "draws",
            {"nsamples": 200, "rseed": None},
        ),
        Row(
            "DeepExplainer",
            DeepFamily,
            "rescale rule as derivative of stand-in activations",
            "nothing",
            {"check_additivity": True},
        ),
        Row(
            "KernelExplainer",
            KernelFamily,
            "least squares of SHAP's run, solved on tensors",
            "sampled coalitions, selected features",
            {"nsamples": "auto", "l1_reg": "num_features(10)", "silent": True, "gc_collect": False},
        ),
        Row(
            "SamplingExplainer",
            SamplingFamily,
            "SHAP's samples, correction on tensors",
            "samples and their numbers",
            {"nsamples": 2000, "min_samples_per_feature": 100, "silent": True},
        ),
        Row(
            "PermutationExplainer",
            PermutationFamily,
            "linear in coalition values",
            "permutations",
            {"max_evals": 500, **_EVALS},
        ),
        Row(
            "ExactExplainer",
            ExactFamily,
            "linear in coalition values",
            "nothing",
            {"max_evals": 100000, **_EVALS},
        ),
        Row(
            "PartitionExplainer",
            PartitionFamily,
            "linear in coalition values",
            "expanded part of the tree",
            {"max_evals": 500, "fixed_context": None, **_EVALS},
        ),
        Row(
            "CoalitionExplainer",
            WinterFamily,
            "linear in coalition values",
            "nothing",
            {"max_evals": 500, "fixed_context": None, **_EVALS},
        ),
        Row(
            "AdditiveExplainer",
            AdditiveFamily,
            "differences of recorded outputs",
            "nothing",
            {"silent": True},
        ),
        Row(
            "LinearExplainer",
            LinearFamily,
            "coefficients read off the module",
            "orders of imputed features",
            {"silent": True},
        ),
    )
}

_REFUSED = {
    "TreeExplainer": "walks the splits of trees, and there is no torch model behind it",
    "GPUTreeExplainer": "walks the splits of trees, and there is no torch model behind it",
    "TreeGain": "returns numbers that a tree stores",
    "Coefficient": "returns numbers that a linear model stores",
    "Maple": "fits a forest to the answers, which has no derivative",
    "TreeMaple": "fits a forest to the answers, which has no derivative",
    "Random": "returns random numbers that do not depend on the model",
    "LimeTabular": "is the lime package's, which selects features on arrays; captum.attr.Lime is "
    "adapted",
    "Explainer": "only chooses one of the others; pass what shap.Explainer(...) makes",
}


def is_shap(cls: type) -> bool:
    """Whether a class is SHAP's, or derives from one, told without importing SHAP."""
    return any(base.__module__.partition(".")[0] == "shap" for base in cls.__mro__)


def adapter_of(explainer: Any, differentiation: Differentiation | None, model: Any) -> Any:
    """Make a SHAP explainer, or class of explainers, differentiable."""
    if isinstance(explainer, type):
        if issubclass(explainer, ShapAdapter):
            return explainer
        return _class_for(_row_of(explainer))
    if isinstance(explainer, ShapAdapter):
        twin = explainer if model is None else explainer.with_model(model)
        if differentiation in (None, twin.differentiation):
            return twin
        import copy

        return copy.copy(twin).with_differentiation(differentiation)
    cls: Any = _class_for(_row_of(type(explainer)))
    return cls.of(explainer, differentiation or "double_backprop", model)


def _row_of(cls: type) -> Row:
    """Find the row of a class, or of one that SHAP made for a single explainer."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != "shap":
            break  # a user's subclass may override the very step that is done again
        stock = getattr(shap(), base.__name__, None)
        if base is stock and base.__name__ in ROWS:
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


def _class_for(row: Row) -> type:
    """Return the adapter's class, made when it is first asked for."""
    found: type = getattr(sys.modules[__name__], f"Differentiable{row.name}")
    return found


def __getattr__(name: str) -> Any:
    row = ROWS.get(name.removeprefix("Differentiable"))
    if row is None or not name.startswith("Differentiable"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cls = _make(row)
    setattr(sys.modules[__name__], name, cls)
    return cls


def _make(row: Row) -> type:
    stock = getattr(shap(), row.name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._explain(args, kwargs)

    def attribute(self: Any, inputs: Any, target: Any = None, **options: Any) -> Any:
        return self._attribute(inputs, target, bound(options))

    def bound(options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name not in row.options:
                raise TypeError(
                    f"`{name}`: expected an option of {row.name} ({', '.join(row.options)}), found "
                    "something else. Check the spelling."
                )
        return {"silent": True, **options} if "silent" in row.options else options

    call.__doc__ = (
        f"As :meth:`shap.{row.name}.__call__`, with ``.tensor`` and ``.tensor_base`` beside."
    )
    call.__kwdefaults__ = stock.__call__.__kwdefaults__  # SHAP's code and users read them
    call.__signature__ = inspect.signature(stock.__call__)  # type: ignore[attr-defined]  # for inspect
    attribute.__doc__ = f"Attributions by :class:`shap.{row.name}`, like ``inputs``."
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in row.options.items()
    ]
    plain = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("self", inspect.Parameter.empty),
            ("inputs", inspect.Parameter.empty),
            ("target", None),
        )
    ]
    attribute.__signature__ = inspect.Signature([*plain, *own])  # type: ignore[attr-defined]  # for inspect
    members = {
        "_stock": stock,
        "__module__": __name__,
        "__doc__": f":class:`shap.{row.name}` with its graph.",
        "__call__": call,
        "attribute": attribute,
    }
    if row.name in ("GradientExplainer", "DeepExplainer"):
        from captum_priors.adapters._shap._torch_family import keeps_training_flags

        members["__init__"] = keeps_training_flags(stock.__init__)
    return type(f"Differentiable{row.name}", (row.family, stock), members)
