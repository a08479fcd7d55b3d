"""``differentiable``: the closed table of explainers that may be trained on."""

import copy
from collections.abc import Callable
from typing import Any, cast

from captum.attr import Attribution

from captum_priors._errors import NotDifferentiableError, one_of, refusal
from captum_priors._probe import check_explainer
from captum_priors._types import DIFFERENTIATIONS, Differentiation
from captum_priors.adapters.captum import (
    ADAPTERS,
    REGISTERED,
    CaptumAdapter,
    adapted,
    no_conversion,
)
from captum_priors.adapters.shap import adapter_of, is_shap
from captum_priors.attr import ExpectedGradients, LayerExpectedGradients

_OWN = (ExpectedGradients, LayerExpectedGradients, CaptumAdapter)


class Differentiable:
    r"""Give an explainer the graph from its attributions to the model's parameters.

    ``differentiable(explainer)`` returns an explainer with the same ``attribute`` and the same
    numbers whose result can be differentiated; given a Captum class it returns a subclass of it.
    The explainer passed in is left untouched, and converting twice is converting once. What has no
    certified conversion is refused; where Captum's own number leaves something out (a layer whose
    runs feed one another, activations that its rules do not cover), a warning says so once. Of a
    layer that several inputs share, which Captum takes the last run of, attributions are a tuple,
    one entry for each run. A module whose output has logits is explained by them. What is explained
    is the function that is trained, also where torch computes another one without gradients
    (encoders with a padding mask).

    Args:
        explainer: A Captum explainer or class, or any object with Captum's ``attribute`` whose
            result already carries its graph; or a SHAP explainer or class.
        differentiation: How the parameter gradient is taken; see :class:`ExpectedGradients`. By
            default ``"double_backprop"``, or what an explainer that has one was made with. Not
            with a class: apply it to the instance.
        model: The torch model (a module or a function of tensors) behind a SHAP explainer that
            holds a NumPy function. Both must say the same on the background.

    Returns:
        The differentiable explainer or class.

    Raises:
        NotDifferentiableError: If no conversion of this explainer is certified.
        TypeError: If it is no explainer at all.

    Example:
        >>> import torch
        >>> from captum.attr import IntegratedGradients
        >>> from captum_priors import differentiable
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
        >>> stock = IntegratedGradients(model)
        >>> x = torch.randn(2, 3)
        >>> attributions = differentiable(stock).attribute(x, target=1)
        >>> torch.equal(attributions, stock.attribute(x, target=1)), attributions.requires_grad
        (True, True)
    """

    def __call__(
        self,
        explainer: Any,
        *,
        differentiation: Differentiation | None = None,
        model: Any = None,
    ) -> Any:
        """Convert an explainer or a class."""
        if differentiation is not None:
            one_of("differentiation", differentiation, DIFFERENTIATIONS)
        if isinstance(explainer, type):
            return self._convert_class(explainer, differentiation)
        if type(explainer) in REGISTERED:
            return REGISTERED[type(explainer)](explainer, differentiation or "double_backprop")
        if is_shap(type(explainer)):
            return adapter_of(explainer, differentiation, model)
        if model is not None:
            raise refusal(
                TypeError,
                "`model`",
                "a SHAP explainer to go with it",
                type(explainer).__name__,
                "Other explainers hold their model themselves: leave it out.",
            )
        if isinstance(explainer, _OWN):
            if differentiation in (None, explainer.differentiation):
                return explainer
            twin = copy.copy(explainer)
            if isinstance(twin, CaptumAdapter):
                return twin.with_differentiation(differentiation)
            twin.differentiation = differentiation
            return twin
        if isinstance(explainer, Attribution):
            return adapted(explainer, differentiation or "double_backprop")
        check_explainer(explainer)
        if differentiation not in (None, getattr(explainer, "differentiation", None)):
            raise refusal(
                NotDifferentiableError,
                "`differentiation`",
                f"None for a {type(explainer).__name__}, which brings its own graph",
                repr(differentiation),
                "Register a conversion that honours it with differentiable.register.",
            )
        return explainer

    @staticmethod
    def _convert_class(cls: type, differentiation: Differentiation | None) -> type:
        if differentiation is not None:
            raise refusal(
                TypeError,
                "`differentiation`",
                "an explainer to apply it to",
                f"the class {cls.__name__}",
                f"Write differentiable({cls.__name__}(model), differentiation=...).",
            )
        if issubclass(cls, _OWN):
            return cls
        if is_shap(cls):
            return cast("type", adapter_of(cls, None, None))
        if cls not in ADAPTERS:
            raise NotDifferentiableError(no_conversion(cls))
        return ADAPTERS[cls]

    @staticmethod
    def register(cls: type, convert: Callable[..., Any]) -> None:
        """Let ``convert(explainer, differentiation)`` make explainers of this class differentiable.

        Certify the result with :func:`captum_priors.testing.check_differentiable`.
        """
        if not isinstance(cls, type) or not callable(convert):
            raise refusal(
                TypeError,
                "`register`",
                "a class and a function",
                f"{cls!r} and {convert!r}",
                "Pass differentiable.register(MyExplainer, convert).",
            )
        REGISTERED[cls] = convert


differentiable = Differentiable()
differentiable.__doc__ = Differentiable.__doc__
