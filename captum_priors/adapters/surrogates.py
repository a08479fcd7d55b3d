r"""LIME and KernelSHAP: the fitted linear surrogate, with the exact Jacobian of its solution.

With masks :math:`X`, similarities :math:`w` and outputs :math:`y`, the coefficients are linear in
the outputs, :math:`\beta = C y`. The surrogate is Captum's own, fitted on constants; its
coefficients get the gradient of :math:`C (y - \mathrm{const})`. For the lasso, the active set and
the signs are held fixed: coefficients that are zero have a zero gradient.
"""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from captum.attr import KernelShap, Lime, LimeBase
from torch import Tensor

from captum_priors._captum import (
    SkLearnLasso,
    SkLearnLinearRegression,
    SkLearnRidge,
    as_tuple,
)
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.adapters.keep_graph import KeepGraph
from captum_priors.adapters.methods import ModeAdapter

_SUPPORTED: dict[type, tuple[str, ...]] = {
    SkLearnLinearRegression: ("fit_intercept",),
    SkLearnRidge: ("fit_intercept", "alpha"),
    SkLearnLasso: ("fit_intercept", "alpha", "max_iter", "tol"),
}


class LinearSurrogate:
    """Stands in for Captum's interpretable model during one attribution."""

    def __init__(self, stock: Any) -> None:
        self._stock = copy.deepcopy(stock)
        self._change = torch.zeros(())

    def fit(self, train_data: Iterable[Any], **options: Any) -> Any:
        """Fit the stock model on constants, and keep what the outputs change about it."""
        batches = list(train_data)  # once: each iteration of a DataLoader draws a seed
        result = self._stock.fit([[t.detach() for t in batch] for batch in batches], **options)
        inputs, outputs, weights = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if inputs.requires_grad or weights.requires_grad:
            raise refusal(
                NotDifferentiableError,
                "`similarity_func`",
                "masks and weights of the samples that are constants",
                "some with a graph, to learned baselines or the model's own features",
                "Detach what they are computed from.",
            )
        jacobian = self._jacobian(inputs, weights)
        deviation = (outputs - outputs.detach()).flatten().to(jacobian.dtype)
        self._change = jacobian.to(deviation.device) @ deviation
        return result

    def representation(self) -> Tensor:
        """Return the coefficients."""
        coefficients: Tensor = self._stock.representation()
        return coefficients + self._change.reshape(coefficients.shape).to(coefficients)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stock"], name)

    def _jacobian(self, inputs: Tensor, weights: Tensor) -> Tensor:
        r"""Derivative of the coefficients by the outputs, ``(features, samples)``, in float64.

        With the rows :math:`\sqrt{\alpha}\, I` below the weighted masks, ridge regression is least
        squares; the lasso is least squares on its active set, less a constant.
        """
        x, root = inputs.double().flatten(1), weights.double().reshape(-1, 1).sqrt()
        options = self._stock.construct_kwargs
        if options.get("fit_intercept", True):
            x = x - (root.square() * x).sum(0) / root.square().sum()
        ridge, lasso = (type(self._stock) is kind for kind in (SkLearnRidge, SkLearnLasso))
        shrinkage = float(options.get("alpha", 1.0)) ** 0.5 if ridge else 0.0
        design = torch.cat([root * x, shrinkage * torch.eye(x.shape[1]).to(x)])
        active = self._stock.representation().flatten().to(x) != 0 if lasso else slice(None)
        jacobian = torch.zeros_like(x.T)
        jacobian[active] = torch.linalg.pinv(design[:, active])[:, : len(x)] * root.T
        return jacobian


class KeepCoefficients(KeepGraph):
    """Also keeps the graph of coefficients that LIME spreads one by one, as numbers."""

    _rewrites: ClassVar[dict[Any, str]] = {**KeepGraph._rewrites, Tensor.item: "_item"}
    _only_in: ClassVar[dict[Any, str]] = {Tensor.item: Lime.__module__}

    def _item(self, tensor: Tensor) -> Any:
        return tensor if tensor.requires_grad else tensor.item()


class SurrogateAdapter(ModeAdapter):
    """Runs LIME's own code around a differentiable stand-in for its linear model."""

    # The samples; scikit-learn's lasso; the import of scikit-learn, which Captum leaves to a fit.
    draws: ClassVar[tuple[str, ...]] = ("torch", "numpy", "python")
    _mode: ClassVar[type[KeepGraph]] = KeepCoefficients
    interpretable_model: Any
    _weights_depend_on_inputs: ClassVar[bool] = True

    def _check(self) -> None:
        super()._check()
        model = self.interpretable_model
        known = _SUPPORTED.get(type(model))
        if known is None or not set(model.construct_kwargs) <= set(known):
            raise refusal(
                NotDifferentiableError,
                "`interpretable_model`",
                "SkLearnLinearRegression, SkLearnRidge or SkLearnLasso with no other options "
                "than fit_intercept, alpha, max_iter and tol",
                f"{type(model).__name__}({getattr(model, 'construct_kwargs', '')})",
                "Its solution has no Jacobian that is certified.",
            )

    def _with_graph(self, given: dict[str, Any]) -> Any:
        moving = any(t.requires_grad for t in as_tuple(given["inputs"]))
        if moving and self._weights_depend_on_inputs:
            raise refusal(
                NotDifferentiableError,
                "`inputs`",
                "inputs that require no gradient",
                "some that do",
                "The weights of the samples depend on the inputs and are held fixed: detach.",
            )
        worker = copy.copy(self)
        worker.interpretable_model = LinearSurrogate(self.interpretable_model)
        return super(SurrogateAdapter, worker)._with_graph(given)


class DifferentiableLimeBase(SurrogateAdapter, LimeBase):
    """:class:`captum.attr.LimeBase` with its graph."""

    _stock = LimeBase


class DifferentiableLime(SurrogateAdapter, Lime):
    """:class:`captum.attr.Lime` with its graph."""

    _stock = Lime


class DifferentiableKernelShap(SurrogateAdapter, KernelShap):
    """:class:`captum.attr.KernelShap` with its graph; its weights depend on coalitions alone."""

    _stock = KernelShap
    _weights_depend_on_inputs = False
