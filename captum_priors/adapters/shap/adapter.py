"""What all SHAP adapters share: SHAP's calls, Captum's call, Explanations."""

import copy
import copyreg
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_priors._captum import as_tuple, like_inputs
from captum_priors._checks import check_inputs, check_target
from captum_priors._errors import TargetError, expected_found
from captum_priors._rows import selected
from captum_priors._types import Differentiation, Target, TensorOrTuple
from captum_priors.adapters.shap.model import (
    TorchModel,
    imported,
    numbers,
    refused,
    stock_function,
)
from captum_priors.engine import attribution_call


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
    # For the documentation: how, and what the gradient takes as constant.
    mechanism: ClassVar[str]
    held_fixed: ClassVar[str] = "nothing"
    # What `attribute` takes besides; and SHAP's defaults that differ from those of `shap_values`.
    options: ClassVar[tuple[str, ...]] = ("silent",)
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        explainer: Any,
        model: Any = None,
        differentiation: Differentiation = "double_backprop",
    ) -> None:
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

    # What differs from one to another.

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

    def _explain(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Return the Explanation, or one for each argument."""
        raise NotImplementedError

    # As SHAP.

    @attribution_call
    def __call__(self, *args: Any, **options: Any) -> Any:
        """Explain as SHAP, with ``.tensor`` and ``.tensor_base`` beside the arrays."""
        return self._explain(args, {**self.defaults, **options})

    @torch.no_grad()
    @attribution_call
    def shap_values(self, X: Any, **options: Any) -> Any:  # noqa: N803  # SHAP's name
        """Explain as SHAP, arrays alone."""
        return self._explain([X], options).values

    @property
    def expected_value(self) -> Any:
        """The base value of the model as it is now, in the units of the link."""
        with torch.inference_mode(False), torch.no_grad():
            base = self._base()
        return getattr(self.explainer, "expected_value", None) if base is None else _plain(base)

    def _worker(self, step: str, function: Callable[..., Any]) -> Any:
        """Copy SHAP's explainer with one step replaced, for SHAP's own methods to call."""
        worker = copy.copy(self.explainer)
        setattr(worker, step, function)
        return worker

    def _check_constant(self, args: Sequence[Any]) -> None:
        """Refuse inputs with a graph where a method takes them as constants."""
        if any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise refused(
                f"`inputs` of {type(self.explainer).__name__}",
                "inputs that require no gradient",
                "some that do",
                "They go through NumPy and are constants to it: detach them.",
            )

    # As Captum.

    @attribution_call
    def attribute(self, inputs: TensorOrTuple, target: Target = None, **options: Any) -> Any:
        """Attribute the target output to the inputs.

        Args:
            inputs: A tensor ``(batch, ...)``, or a tuple of them.
            target: The output, or one for each example; none where there is one.
            options: Those of SHAP's ``__call__`` or ``shap_values``.

        Returns:
            Attributions like the inputs.

        Raises:
            TypeError: At an option that SHAP's explainer does not have.
        """
        for name in options:
            if name not in self.options:
                known = f"{type(self.explainer).__name__} ({', '.join(self.options)})"
                raise TypeError(
                    expected_found(
                        f"`{name}`", f"an option of {known}", "another", "Check the spelling."
                    )
                )
        check_inputs(inputs)
        tensors = as_tuple(inputs)
        check_target(target, tensors[0].shape[0])
        quiet = {"silent": True} if "silent" in self.options else {}
        values = self._values(tensors, target, {**quiet, **self.defaults, **options})
        return like_inputs(
            inputs,
            tuple(
                v.to(t) if t.is_floating_point() else v.to(t.device)
                for v, t in zip(values, tensors, strict=True)
            ),
        )

    def _values(
        self, tensors: tuple[Tensor, ...], target: Target, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        found = self._explain(tensors, options)
        each = found if isinstance(found, list) else [found]
        return tuple(select_output(e.tensor, t, target) for e, t in zip(each, tensors, strict=True))


def select_output(values: Tensor, like: Tensor, target: Target) -> Tensor:
    """Pick the target's attributions off the last axis, where SHAP has one for the outputs."""
    if values.dim() == like.dim():
        values = values.unsqueeze(-1)
    index = output_index(target, len(like), values.shape[-1]).to(values.device)
    index = index.reshape(-1, *[1] * (values.dim() - 1))
    return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)


def output_index(target: Target, n_examples: int, n_outputs: int) -> Tensor:
    """Read Captum's spellings of a target as the index of one output for each example."""
    if target is None and n_outputs > 1:
        raise TargetError(
            expected_found(
                "`target`",
                f"which of the {n_outputs} outputs to explain",
                "None",
                "Pass target=... (a class index, or one for each example).",
            )
        )
    given: Any = target.cpu() if isinstance(target, Tensor) else target
    index = torch.arange(n_outputs).expand(n_examples, n_outputs)
    return selected(index, 0 if target is None else given)


def _plain(base: Tensor) -> Any:
    """Return a base value as SHAP holds it: a float, or an array of several."""
    return numbers(base) if base.dim() else float(base.detach())


@functools.cache
def _explanation_class() -> Any:
    shap = imported()

    def state(self: Any, protocol: Any) -> Any:  # copied and pickled without tensors
        kept = {k: v for k, v in vars(self).items() if k not in ("tensor", "tensor_base")}
        return copyreg.__newobj__, (shap.Explanation,), kept  # type: ignore[attr-defined]  # for pickle

    members = {"__doc__": "SHAP's, with its tensors beside it.", "__reduce_ex__": state}
    return type(shap.Explanation)("DifferentiableExplanation", (shap.Explanation,), members)


def with_tensors(explanation: Any, values: Any, base: Tensor) -> Any:
    """Put tensors beside the arrays of an Explanation.

    A graph cannot be copied, and SHAP's plots copy: copies and slices have none.
    """
    found = _explanation_class().__new__(_explanation_class())
    vars(found).update(vars(explanation), tensor=values, tensor_base=base)
    return found


def explanation(values: Tensor, base: Tensor, data: Any, names: Any = None, **arrays: Any) -> Any:
    """Build an Explanation from its tensors, with the names that SHAP's plots ask for.

    Args:
        values: Tensor ``(rows, features, ...)``, or one row.
        base: The base value of each row.
        data: What is explained, as the user passed it; or None.
        names: Names of the features; by default the columns of a DataFrame, or numbers.
        arrays: Further arrays of the Explanation.
    """
    if hasattr(data, "columns"):
        names, data = list(data.columns), data.to_numpy()
    if names is None and values.dim() - base.dim() == 1:
        names = [f"Feature {i}" for i in range(values.shape[0 if np.ndim(data) == 1 else 1])]
    data = data.detach().cpu().numpy() if isinstance(data, Tensor) else data
    names, base_values = None if names is None else list(names), _plain(base)
    made = imported().Explanation(numbers(values), base_values, data, feature_names=names, **arrays)
    return with_tensors(made, values, base)
