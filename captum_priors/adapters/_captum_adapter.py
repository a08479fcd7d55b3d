"""The base of all adapters: an instance of a Captum class with the same ``attribute``."""

import inspect
from typing import Any, ClassVar

from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors._types import DIFFERENTIATIONS, Differentiation
from captum_priors.engine import attribution_call


class CaptumAdapter:
    """Base of the differentiable twins of Captum's classes; make them with ``differentiable``.

    An adapter is an instance of the class that it stands for and runs that class's own code.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors import CaptumAdapter, differentiable
        >>> adapter = differentiable(Saliency(torch.nn.Linear(3, 1)))
        >>> isinstance(adapter, CaptumAdapter), isinstance(adapter, Saliency)
        (True, True)
    """

    _stock: ClassVar[Any]
    differentiations: ClassVar[tuple[str, ...]] = tuple(DIFFERENTIATIONS)
    draws_baselines: ClassVar[bool] = False
    takes_tensors: ClassVar[bool] = True
    differentiation: Differentiation = "double_backprop"

    @classmethod
    def of(cls, explainer: Any, differentiation: Differentiation) -> Any:
        """Make the differentiable twin of a Captum explainer."""
        twin = cls.__new__(cls)
        twin.__dict__.update(explainer.__dict__)
        return twin.with_differentiation(differentiation)

    def with_differentiation(self, differentiation: Differentiation) -> Any:
        """Set how the parameter gradient is taken, if this class can."""
        if differentiation not in self.differentiations:
            raise NotDifferentiableError(
                expected_found(
                    f"`differentiation` of {self._stock.__name__}",
                    " or ".join(map(repr, self.differentiations)),
                    repr(differentiation),
                    "Its attributions are more than arithmetic on input gradients.",
                )
            )
        self.differentiation = differentiation
        return self

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_stock" not in cls.__dict__:
            return
        stock = inspect.signature(cls._stock.attribute)
        open_end = [p.name for p in stock.parameters.values() if p.kind is p.VAR_KEYWORD]

        def attribute(self: CaptumAdapter, *args: Any, **kwargs: Any) -> Any:
            given = stock.bind(self, *args, **kwargs).arguments
            del given["self"]
            for name in open_end:
                given.update(given.pop(name, {}))
            if self._stock is not cls._stock:  # by a method that builds on it, within its own call
                return inspect.unwrap(cls._stock.attribute)(self, **given)
            return self._attribute_with_graph(given)

        attribute.__doc__ = f"As :meth:`captum.attr.{cls._stock.__name__}.attribute`."
        attribute.__signature__ = stock  # type: ignore[attr-defined]  # what inspect reads
        attribute.__qualname__ = f"{cls.__name__}.attribute"
        cls.attribute = attribution_call(attribute)  # type: ignore[attr-defined]  # Captum's name

    def _attribute_with_graph(self, given: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _run_stock(self, **given: Any) -> Any:
        return inspect.unwrap(self._stock.attribute)(self, **given)
