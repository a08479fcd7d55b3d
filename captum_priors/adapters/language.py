"""Adapters of the classes that wrap another explainer and explain something else than tensors."""

import copy
from typing import Any, ClassVar

import torch
from captum.attr import (
    DataLoaderAttribution,
    LLMAttribution,
    LLMGradientAttribution,
)
from torch import Tensor

from captum_priors._captum import (
    SUPPORTED_METHODS,
    GradientForwardFunc,
    called_with_batches,
    called_with_texts,
)
from captum_priors._types import Differentiation
from captum_priors.adapters.captum import adapted
from captum_priors.adapters.methods import ModeAdapter


class WrapperAdapter(ModeAdapter):
    """Runs the wrapper under the mode, around the adapter of what it wraps."""

    differentiations = ("double_backprop",)
    draws: ClassVar[tuple[str, ...]] = ("torch", "numpy", "python")  # loaders, text baselines
    takes_tensors: ClassVar[bool] = False
    attr_method: Any
    _called_by_method: ClassVar[Any]  # of this object, the function that the method explains

    def __init__(self, attr_method: Any, *args: Any, **options: Any) -> None:
        self._stock.__init__(self, self._as_stock(attr_method), *args, **options)
        self._wrap(attr_method)

    @classmethod
    def of(cls, explainer: Any, differentiation: Differentiation) -> Any:
        """Make the differentiable twin of a Captum explainer."""
        twin = super().of(explainer, differentiation)
        method = copy.copy(explainer.attr_method)
        method.forward_func = explainer.forward_func
        twin._wrap(method)
        return twin

    def _as_stock(self, attr_method: Any) -> Any:
        return attr_method

    def _wrap(self, attr_method: Any) -> None:
        """Take the differentiable twin of a method, and let it call this object."""
        self.attr_method = adapted(copy.copy(attr_method))
        self.attr_method.forward_func = self._called_by_method(self)

    def _attribute_with_graph(self, given: dict[str, Any]) -> Any:
        run = self._with_graph if torch.is_grad_enabled() else self._without_graph
        return run(given)


class DifferentiableDataLoaderAttribution(WrapperAdapter, DataLoaderAttribution):
    """:class:`captum.attr.DataLoaderAttribution` with its graph, to every batch of the loader."""

    _stock = DataLoaderAttribution
    _called_by_method = called_with_batches

    def _as_stock(self, attr_method: Any) -> Any:
        """Captum asks for an exact type."""
        stock: Any = getattr(attr_method, "_stock", None)
        if stock not in SUPPORTED_METHODS:
            return attr_method
        plain = stock.__new__(stock)
        plain.__dict__.update(attr_method.__dict__)
        return plain


class LanguageAdapter(WrapperAdapter):
    """What the two language-model adapters share."""

    def tensors_of(self, result: Any) -> Tensor:
        """Attributions for a penalty, ``(tokens of the response, features)``; one row without."""
        tokens: Tensor | None = result.token_attr
        whole: Tensor = result.seq_attr
        return whole.unsqueeze(0) if tokens is None else tokens


class DifferentiableLLMAttribution(LanguageAdapter, LLMAttribution):
    """:class:`captum.attr.LLMAttribution` whose result carries its graph."""

    _stock = LLMAttribution
    _called_by_method = called_with_texts


class DifferentiableLLMGradientAttribution(LanguageAdapter, LLMGradientAttribution):
    """:class:`captum.attr.LLMGradientAttribution` whose result carries its graph."""

    _stock = LLMGradientAttribution
    _called_by_method = GradientForwardFunc
