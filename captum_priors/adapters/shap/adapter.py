"""What all SHAP adapters share: SHAP's calls, Captum's call, Explanations."""

import copyreg
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._checks import check_inputs, check_target
from captum_priors._errors import refusal
from captum_priors._rows import selected
from captum_priors._types import Differentiation, Target, TensorOrTuple
from captum_priors.adapters.shap.model import (
    TorchModel,
    imported,
    numbers,
    refused,
    stock_function,
)
from captum_priors.engine import attribution_call, check_rows
from captum_priors.outputs import SeveralOutputs, SumOfOutputs, stacked

Tensors = tuple[Tensor, ...]
Options = dict[str, Any]


class ShapAdapter:
    r"""Base of what ``differentiable`` makes of SHAP's explainers: one of them, with its graph.

    A plain object around the user's untouched explainer. ``adapter(X)`` is a ``shap.Explanation``
    with ``.tensor`` and ``.tensor_base`` beside its arrays, ``shap_values`` gives arrays, and
    ``attribute(inputs, target=...)`` is Captum's. Values, draws and options are SHAP's; base values
    are those of the model as it is now, which is explained in the mode that it is in. Every table
    goes to the model in the dtype and on the device of the model's parameters.

    Args:
        explainer: One of SHAP's explainers.
        model: The torch module, or function of tensors, behind the function that it holds.
        differentiation: How the parameter gradient is taken, where there is a choice.

    Raises:
        NotDifferentiableError: If there is no torch model, or not this differentiation.
        ValueError: If the model does not say what SHAP's function says.

    Example:
        >>> import pytest
        >>> shap = pytest.importorskip("shap")
        >>> import torch
        >>> from captum_priors import ShapAdapter, differentiable
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> predict = lambda x: net(torch.as_tensor(x, dtype=torch.float32)).detach().numpy()[:, 0]
        >>> background, x = torch.randn(9, 3), torch.randn(2, 3)
        >>> stock = shap.KernelExplainer(predict, background.numpy())
        >>> adapter = differentiable(stock, model=net)
        >>> isinstance(adapter, ShapAdapter), adapter.explainer is stock
        (True, True)
        >>> phi = adapter.attribute(x)
        >>> total = phi.sum(1) + float(adapter.expected_value)
        >>> torch.allclose(total, net(x)[:, 0], atol=1e-5), phi.requires_grad
        (True, True)
    """

    differentiations: ClassVar[tuple[str, ...]] = ("double_backprop",)
    draws: ClassVar[tuple[str, ...]] = ("numpy",)
    takes_several_outputs: ClassVar[bool] = True
    # For the documentation: how, and what the gradient takes as constant.
    mechanism: ClassVar[str]
    held_fixed: ClassVar[str] = "nothing"
    # What `attribute` takes besides; and SHAP's defaults that differ from those of `shap_values`.
    options: ClassVar[tuple[str, ...]] = ("silent",)
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, explainer: Any, model: Any, differentiation: Differentiation) -> None:
        name = type(explainer).__name__
        if differentiation not in self.differentiations:
            raise refused(
                f"`differentiation` of {name}",
                " or ".join(map(repr, self.differentiations)),
                repr(differentiation),
                "It differentiates the model once, which the default does, also where the "
                "model's backward pass cannot be differentiated.",
            )
        self.explainer, self.given, self.differentiation = explainer, model, differentiation
        self._start()
        self._torch = TorchModel(self._function(), model, self._sample(), name)

    @property
    def model(self) -> Any:
        """The torch module or function that is explained."""
        return self._torch.function

    @property
    def forward_func(self) -> Any:
        """The model as a function of tensors in any dtype."""
        return self._torch.once

    def _start(self) -> None:
        """Look at the explainer before its model."""

    def _function(self) -> Any:
        """Return SHAP's model."""
        return stock_function(self.explainer.model)

    def _sample(self) -> Sequence[Any] | None:
        """Return arguments to try the model on, where there are some before the first call."""
        raise NotImplementedError

    def _base(self) -> Tensor | None:
        """Return the base value of the model as it is now, in the units of the link."""
        raise NotImplementedError

    def _explain(self, rows: Any, options: Options) -> Any:
        """Return the Explanation, or one for each input."""
        raise NotImplementedError

    @attribution_call
    def __call__(self, X: Any, **options: Any) -> Any:  # noqa: N803  # SHAP's name
        """Explain as SHAP, with ``.tensor`` and ``.tensor_base`` beside the arrays."""
        return self._explain(X, {**self.defaults, **options})

    @torch.no_grad()
    @attribution_call
    def shap_values(self, X: Any, **options: Any) -> Any:  # noqa: N803  # SHAP's name
        """Explain as SHAP, arrays alone."""
        return self._explain(X, options).values

    @property
    @attribution_call
    def expected_value(self) -> Any:
        """The base value of the model as it is now, in the units of the link."""
        with torch.no_grad():
            base = self._base()
        return base if base is None else numbers(base)[()]

    def _check_constant(self, rows: Any) -> None:
        """Refuse inputs with a graph where a method takes them as constants."""
        if isinstance(rows, Tensor) and rows.requires_grad:
            raise refused(
                f"`inputs` of {type(self.explainer).__name__}",
                "inputs that require no gradient",
                "some that do",
                "They go through NumPy and are constants to it: detach them.",
            )

    @attribution_call
    def attribute(self, inputs: TensorOrTuple, target: Target = None, **options: Any) -> Any:
        """Attribute the target output to the inputs.

        Args:
            inputs: A tensor ``(batch, ...)``, or a tuple of them.
            target: The output, or one for each example; none where there is one. Of sums of
                outputs SHAP's values are added up, in the units of its link.
            options: Those of SHAP's ``__call__`` or ``shap_values``.

        Returns:
            Attributions like the inputs, or like what the layer receives that SHAP explains.

        Raises:
            TypeError: At an option that SHAP's explainer does not have.
        """
        for name in set(options) - set(self.options):
            known = f"{type(self.explainer).__name__} ({', '.join(self.options)})"
            raise refusal(
                TypeError, f"`{name}`", f"an option of {known}", "another", "Check the spelling."
            )
        check_target(target, check_inputs(inputs))
        tensors = as_tuple(inputs)
        quiet = {"silent": True} if "silent" in self.options else {}
        targets: Sequence[Target] = [target]
        if isinstance(target, SeveralOutputs):
            targets = target.known(self.forward_func, tensors, ()).targets or ()
        each = self._values(tensors, targets, {**quiet, **self.defaults, **options})
        values = stacked(each) if isinstance(target, SeveralOutputs) else each[0]
        like = tensors[0] if tensors[0].is_floating_point() else tensors[0].device
        found = tuple(value.to(like) for value in values)
        return found if isinstance(inputs, tuple) or len(found) > 1 else found[0]

    def _values(
        self, tensors: Tensors, targets: Sequence[Target], options: Options
    ) -> list[Tensors]:
        """Return the attributions of each target, one tensor for each input."""
        values = self._explain(tensors[0], options).tensor
        return [(select_output(values, tensors[0], target),) for target in targets]


def select_output(values: Tensor, like: Tensor, target: Target) -> Tensor:
    """Pick the target's attributions off the last axis, where SHAP has one for the outputs."""
    if values.dim() == like.dim():
        values = values.unsqueeze(-1)
    if isinstance(target, SumOfOutputs):
        weights = target.spread(values.new_zeros(len(like), values.shape[-1]))
        return (values * weights.reshape(len(like), *[1] * (values.dim() - 2), -1)).sum(-1)
    given: Any = target.cpu() if isinstance(target, Tensor) else target
    index = selected(torch.arange(values.shape[-1]).expand(len(like), -1), given)
    check_rows(index, len(like))
    index = index.to(values.device).reshape(-1, *[1] * (values.dim() - 1))
    return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)


@functools.cache
def _explanation_class() -> Any:
    shap = imported()

    class DifferentiableExplanation(shap.Explanation):  # type: ignore[name-defined]  # of any type
        """SHAP's, whose copies and slices leave the tensors behind: a graph cannot be copied."""

        def __reduce_ex__(self, protocol: Any) -> Any:
            kept = {k: v for k, v in vars(self).items() if k not in ("tensor", "tensor_base")}
            return copyreg.__newobj__, (shap.Explanation,), kept  # type: ignore[attr-defined]  # for pickle

    return DifferentiableExplanation


def with_tensors(explanation: Any, values: Any, base: Tensor) -> Any:
    """Put tensors beside the arrays of an Explanation."""
    found = _explanation_class().__new__(_explanation_class())
    vars(found).update(vars(explanation), tensor=values, tensor_base=base)
    return found


def explanation(values: Tensor, base: Tensor, data: Any, names: Any = None, **arrays: Any) -> Any:
    """Build an Explanation of rows, or one row, with the names that SHAP's plots ask for."""
    if hasattr(data, "columns"):
        names, data = list(data.columns), data.to_numpy()
    if names is None and values.dim() - base.dim() == 1:
        names = [f"Feature {i}" for i in range(values.shape[0 if np.ndim(data) == 1 else 1])]
    data = data.detach().cpu().numpy() if isinstance(data, Tensor) else data
    arrays |= {"data": data, "feature_names": None if names is None else list(names)}
    made = imported().Explanation(numbers(values), numbers(base)[()], **arrays)
    return with_tensors(made, values, base)
