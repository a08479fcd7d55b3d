"""Captum's explainers with their graph: the base of their adapters, and the table of them."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from captum.attr import GradientAttribution, LayerAttribution, NoiseTunnel
from torch import Tensor

from captum_priors._captum import (
    as_tuple,
    call_baselines,
    compute_gradients,
    forward_args,
    forward_func_of,
    like_inputs,
)
from captum_priors._checks import check_distribution, check_floating, check_target, check_tensors
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors._rows import Rows
from captum_priors._types import DIFFERENTIATIONS, Differentiation, OutputTarget
from captum_priors.adapters.selecting import selecting
from captum_priors.attr import ExpectedGradients
from captum_priors.attr.layers import copied
from captum_priors.engine import attribution_call
from captum_priors.engine.model import call_beside
from captum_priors.outputs import SeveralOutputs

ADAPTERS: dict[type, type["CaptumAdapter"]] = {}
"""The adapter of each class, by its exact type: a subclass may override the very step that keeps
the graph."""
REGISTERED: dict[type, Callable[[Any, Differentiation], Any]] = {}
"""What users registered."""


# Classes that send several points of each example through the model together.
_STACKING = (
    "IntegratedGradients",
    "Conductance",
    "InternalInfluence",
    "GradientShap",
    "DeepLift",
    "NoiseTunnel",
)
# Of layers, those whose path runs between inputs, not between what the layer makes of them.
_BETWEEN_INPUTS = ("Conductance", "InternalInfluence", "GradientShap", "DeepLiftShap")


class CaptumAdapter:
    """Base of the differentiable twins of Captum's classes; make them with ``differentiable``.

    An adapter is an instance of the class that it stands for and runs that class's own code.

    Attributes:
        differentiations: The ways in which its parameter gradient can be taken.
        draws: The global random streams that its method draws from.
        draws_baselines: Whether its baselines are a distribution, not one row for each example.
        takes_tensors: Whether it explains tensors.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors import CaptumAdapter, differentiable
        >>> adapter = differentiable(Saliency(torch.nn.Linear(3, 1)))
        >>> isinstance(adapter, CaptumAdapter), isinstance(adapter, Saliency), adapter.draws
        (True, True, ())
    """

    _stock: ClassVar[Any]
    _takes: ClassVar[frozenset[str]]  # the arguments of its ``attribute``
    differentiations: ClassVar[tuple[str, ...]] = tuple(DIFFERENTIATIONS)
    draws: ClassVar[tuple[str, ...]] = ()
    draws_baselines: ClassVar[bool] = False
    takes_tensors: ClassVar[bool] = True
    takes_several_outputs: ClassVar[bool] = True
    differentiation: Differentiation = "double_backprop"

    @classmethod
    def of(cls, explainer: Any, differentiation: Differentiation) -> Any:
        """Make the differentiable twin of a Captum explainer."""
        twin = cls.__new__(cls)
        twin.__dict__.update(explainer.__dict__)
        twin._check()
        return twin.with_differentiation(differentiation)

    def with_differentiation(self, differentiation: Differentiation) -> Any:
        """Set how the parameter gradient is taken, if this class can."""
        if differentiation not in self.differentiations:
            raise refusal(
                NotDifferentiableError,
                f"`differentiation` of {self._stock.__name__}",
                " or ".join(map(repr, self.differentiations)),
                repr(differentiation),
                "Its attributions are more than arithmetic on input gradients.",
            )
        self.differentiation = differentiation
        return self

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_stock" not in cls.__dict__:
            return
        ADAPTERS[cls._stock] = cls
        stock = inspect.signature(cls._stock.attribute)
        cls._takes = frozenset(stock.parameters)
        open_end = [p.name for p in stock.parameters.values() if p.kind is p.VAR_KEYWORD]

        def attribute(self: CaptumAdapter, *args: Any, **kwargs: Any) -> Any:
            given = stock.bind(self, *args, **kwargs).arguments
            del given["self"]
            for name in open_end:
                given.update(given.pop(name, {}))
            if self._stock is not cls._stock:  # by a method that builds on it, within its own call
                return inspect.unwrap(cls._stock.attribute)(self, **given)
            if isinstance(given.get("target"), OutputTarget):
                return self._attribute_outputs(given)
            return self._attribute_with_graph(given)

        attribute.__doc__ = f"As :meth:`captum.attr.{cls._stock.__name__}.attribute`."
        attribute.__signature__ = stock  # type: ignore[attr-defined]  # what inspect reads
        attribute.__qualname__ = f"{cls.__name__}.attribute"
        cls.attribute = attribution_call(attribute)  # type: ignore[attr-defined]  # Captum's name

    def _check(self) -> None:
        """Refuse what is set on the explainer and would not be honoured with a graph."""
        own = getattr(self, "gradient_func", compute_gradients)
        if not str(getattr(own, "__module__", "")).startswith("captum."):
            raise refusal(
                NotDifferentiableError,
                "`explainer`",
                "Captum's own gradient_func",
                "another one, which an adapter would replace",
                "Register a conversion of your own with differentiable.register.",
            )

    def _check_call(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        """Check what is explained, for what, and against what; return it as a tuple."""
        # Not that it is one batch: tables for embedding bags and empty features are welcome.
        check_tensors(given["inputs"])
        tensors = as_tuple(given["inputs"])
        if tensors[0].dim() > 0:
            check_target(given.get("target"), tensors[0].shape[0])
        layer = isinstance(self, LayerAttribution)
        between_inputs = any(name in self._stock.__name__ for name in _BETWEEN_INPUTS)
        gradients = isinstance(self, GradientAttribution) and (between_inputs or not layer)
        if isinstance(self, NoiseTunnel) or gradients:
            check_floating(tensors)
        # Elsewhere it is a keyword for something else: a tunnel's method, LIME's functions.
        if "baselines" in self._takes and self.draws_baselines:
            found = given.get("baselines")
            if callable(found):
                found = call_beside(call_baselines, found, given["inputs"])
            each = check_distribution(found if isinstance(found, tuple) else (found,), tensors)
            if (
                "DeepLift" in self._stock.__name__
            ):  # which wants several rows: one twice is the same
                each = tuple(torch.cat([b, b]) if len(b) == 1 else b for b in each)
            given["baselines"] = like_inputs(given["inputs"], each)
        elif "baselines" in self._takes and given.get("baselines") is not None:
            _check_baselines(given["baselines"], tensors)
        if any(name in self._stock.__name__ for name in _STACKING) and tensors[0].dim() > 0:
            args = forward_args(given.get("additional_forward_args"))
            rows = Rows(forward_func_of(self), None, args, tensors[0].shape[0])
            rows.refuse_coupled(tensors, always=self.differentiation == "recompute")
        return tensors

    def _copies(self, given: dict[str, Any], tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        """Give Captum and the model tensors that they may flag and overwrite as they like."""
        flags = isinstance(self, (GradientAttribution, NoiseTunnel))
        own = tuple(t.clone() for t in tensors)
        for t in own:
            if flags and t.is_floating_point() and not t.requires_grad:
                t.requires_grad_()  # so that Captum need not warn that it does
        if isinstance(self, LayerAttribution):
            own = tuple(t.clone() for t in own)  # no leaves, which nobody may work in place on
        copies = {**given, "inputs": like_inputs(given["inputs"], own)}
        if "baselines" in given:
            copies["baselines"] = copied(given["baselines"])
        return copies

    def _attribute_with_graph(self, given: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _attribute_outputs(self, given: dict[str, Any]) -> Any:
        """Attribute sums of outputs, or several: Captum knows indices alone."""
        check_tensors(given["inputs"])
        tensors, target = as_tuple(given["inputs"]), given["target"]
        check_target(target, tensors[0].shape[0])
        if isinstance(target, SeveralOutputs):
            args = forward_args(given.get("additional_forward_args"))
            target = target.known(forward_func_of(self), tensors, args)
            return self._attribute_each(given, target)
        twin, more = selecting(self, target)
        args = (*forward_args(given.get("additional_forward_args")), *more)
        given = {**given, "target": None, "additional_forward_args": args or None}
        return twin._attribute_with_graph(given)

    def _attribute_each(self, given: dict[str, Any], target: SeveralOutputs) -> Any:
        def explain(one: Any) -> Any:
            alone = {**given, "target": one}
            if isinstance(one, OutputTarget):
                return self._attribute_outputs(alone)
            return self._attribute_with_graph(alone)

        return target.explained(explain, self.draws)

    def _run_stock(self, **given: Any) -> Any:
        return inspect.unwrap(self._stock.attribute)(self, **given)


def _check_baselines(baselines: Any, tensors: tuple[Tensor, ...]) -> None:
    """Require what goes with each example: a number, one row, or as many rows."""
    each = baselines if isinstance(baselines, tuple) else (baselines,)
    if len(each) != len(tensors):
        raise refusal(
            ValueError,
            "`baselines`",
            f"{len(tensors)}, one for each input",
            str(len(each)),
            "Pass a tuple with one entry for each of the inputs, in their order.",
        )
    for i, (baseline, tensor) in enumerate(zip(each, tensors, strict=True)):
        name = f"`baselines[{i}]`" if isinstance(baselines, tuple) else "`baselines`"
        if not isinstance(baseline, (Tensor, int, float)):
            raise refusal(
                TypeError,
                name,
                "a tensor or a number",
                type(baseline).__name__,
                "Convert it with torch.as_tensor(..., dtype=..., device=...).",
            )
        shape = tuple(baseline.shape) if isinstance(baseline, Tensor) else ()
        sizes = zip(reversed(shape), reversed(tensor.shape), strict=False)
        if len(shape) > tensor.dim() or not all(size in (1, wanted) for size, wanted in sizes):
            raise refusal(
                ValueError,
                name,
                f"a number, one row, or rows like those of shape {tuple(tensor.shape)}",
                f"shape {shape}",
                "A distribution of reference rows is what ExpectedGradients, GradientShap "
                "and DeepLiftShap take.",
            )


def adapted(explainer: Any, differentiation: Differentiation = "double_backprop") -> Any:
    """Return the twin of one of Captum's explainers; what keeps its own graph stays as it is."""
    if type(explainer) in REGISTERED:
        return REGISTERED[type(explainer)](explainer, differentiation)
    if isinstance(explainer, (CaptumAdapter, ExpectedGradients)):
        return explainer
    if type(explainer) not in ADAPTERS:
        raise NotDifferentiableError(no_conversion(type(explainer)))
    return ADAPTERS[type(explainer)].of(explainer, differentiation)


_ABSTRACT = "an abstract base class that explains nothing by itself. Pass one of its subclasses"
REFUSED: dict[str, str] = {
    "Attribution": _ABSTRACT,
    "GradientAttribution": _ABSTRACT,
    "LayerAttribution": _ABSTRACT,
    "NeuronAttribution": _ABSTRACT,
    "PerturbationAttribution": _ABSTRACT,
    "RemoteLLMAttribution": (
        "which is given plain numbers by a remote server, behind which no gradient can be "
        "followed. Run the language model here and use LLMAttribution"
    ),
}
"""Why a class cannot be trained on, and what to use instead."""

HELD_FIXED: dict[str, str] = {
    "DataLoaderAttribution": "the batches",
    "DeepLift": "which quotients are too small to take, and max-pooling's winners",
    "FeaturePermutation": "the permutation",
    "GradientShap": "the draws",
    "KernelShap": "the sampled coalitions and their weights",
    "LLMAttribution": "the tokens of prompt and response",
    "LRP": "the signs of the stabiliser",
    "Lime": "the samples, their weights, and the active set and signs of the lasso",
    "LimeBase": "the samples and their weights",
    "NoiseTunnel": "the draws",
    "ShapleyValueSampling": "the permutations",
}
"""What a derivative leaves out on purpose, for classes and for what is named after them."""


def held_fixed(name: str) -> str:
    """What is held fixed in the derivative of a class's attributions, empty if nothing is."""
    plain = name.removeprefix("Layer").removeprefix("Neuron")
    same = {"DeepLiftShap": "DeepLift", "LLMGradientAttribution": "LLMAttribution"}
    return HELD_FIXED.get(same.get(plain, plain), "")


def no_conversion(cls: type) -> str:
    """Word the error for a class that has no certified conversion."""
    reason = REFUSED.get(cls.__name__) if cls.__module__.startswith("captum.") else None
    if reason is not None:
        return f"`explainer`: expected one that can be trained on, found {cls.__name__}, {reason}."
    names = ", ".join(sorted(known.__name__ for known in ADAPTERS))
    return (
        f"`explainer`: expected one with a certified conversion ({names}), found {cls.__name__}, "
        "whose attributions carry no correct gradient to the model's parameters. Use one of these, "
        "or register a conversion of your own with differentiable.register and certify it with "
        "captum_priors.testing.check_differentiable."
    )
