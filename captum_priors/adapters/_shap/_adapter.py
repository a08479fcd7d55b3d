"""The base of all SHAP adapters: an instance of a SHAP class, called as it and as Captum's are."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._captum import as_tuple, like_inputs
from captum_priors._checks import check_inputs, check_target
from captum_priors._engine._first_order import marks_start
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._modules import modules_of
from captum_priors._engine._still import held
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors._types import Differentiation, TensorOrTuple
from captum_priors.adapters._shap._explanation import with_tensors
from captum_priors.adapters._shap._torch_model import (
    TorchModel,
    as_array,
    no_torch_model,
    returns_tensors,
    stock_function,
    torch_model_behind,
)

# Replays do the same sums in another order, in float64.
_REPLAYS = 1e-8


class ShapAdapter:
    r"""Base of the differentiable twins of SHAP's explainers; make them with ``differentiable``.

    An adapter is an instance of the class that it stands for. ``adapter(X)`` is SHAP's own
    ``Explanation`` with ``.tensor`` and ``.tensor_base`` beside its arrays, ``shap_values`` and
    ``expected_value`` are SHAP's, and ``attribute(inputs, target=...)`` is Captum's. The model is
    explained in evaluation mode, as SHAP's constructors set it, and put back afterwards; base
    values are those of the model as it is now.

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
        >>> isinstance(adapter, ShapAdapter), isinstance(adapter, shap.KernelExplainer)
        (True, True)
        >>> phi = adapter.attribute(x)
        >>> total = phi.sum(1) + float(adapter.expected_value)
        >>> torch.allclose(total, net(x)[:, 0], atol=1e-5), phi.requires_grad
        (True, True)
    """

    _stock: ClassVar[Any]
    differentiations: ClassVar[tuple[str, ...]] = ("double_backprop",)
    draws_baselines: ClassVar[bool] = False
    _results: ClassVar[tuple[str, ...]] = ()
    differentiation: Differentiation = "double_backprop"
    _only_way: ClassVar[str] = (
        "It differentiates the model once, which the default does, also where the model's backward "
        "pass cannot be differentiated."
    )

    model: Any
    masker: Any
    _torch: TorchModel | None = None
    _given: Any = None
    _bound = False
    _roots: tuple[nn.Module, ...] = ()
    _unchecked = False
    _rows: list[tuple[Tensor, Tensor]] | None = None
    _whole: tuple[Tensor, Tensor] | None = None
    _inputs: tuple[Any, ...] = ()
    _is_still = False

    @classmethod
    def of(cls, explainer: Any, differentiation: Differentiation, model: Any) -> Any:
        """Make the differentiable twin of a SHAP explainer."""
        twin = cls.__new__(cls)
        twin.__dict__.update(explainer.__dict__)
        twin._given, twin._bound = model, False
        twin._take_defaults(type(explainer))
        twin = twin.with_differentiation(differentiation)
        if twin._torch_model() is None:
            raise no_torch_model(cls._stock.__name__)
        return twin

    def with_differentiation(self, differentiation: Differentiation) -> Any:
        """Set how the parameter gradient is taken, if this class can."""
        if differentiation not in self.differentiations:
            raise NotDifferentiableError(
                expected_found(
                    f"`differentiation` of {self._stock.__name__}",
                    " or ".join(map(repr, self.differentiations)),
                    repr(differentiation),
                    self._only_way,
                )
            )
        self.differentiation = differentiation
        return self

    def with_model(self, model: Any) -> Any:
        """Return a copy on another torch model."""
        twin = copy.copy(self)
        twin._given, twin._bound = model, False
        twin._torch_model()
        return twin

    def _take_defaults(self, cls: type) -> None:
        """Keep defaults of ``__call__`` that SHAP stores in a class made for one explainer."""
        if cls is not self._stock and cls.__name__ == self._stock.__name__:
            defaults = dict(cls.__call__.__kwdefaults__ or {})
            adapter: Any = type(self)

            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                return adapter.__call__(self, *args, **{**defaults, **kwargs})

            call.__kwdefaults__ = defaults
            own: Any = type(adapter.__name__, (adapter,), {"__call__": call})
            own.__module__, own.__qualname__ = adapter.__module__, adapter.__qualname__
            self.__class__ = own

    # What differs from family to family.

    def _held(self) -> Any:
        """What SHAP holds as its model."""
        return self.model

    def _sample(self) -> tuple[Any, ...] | None:
        """Arguments to try the model on, where there are some before the first call."""
        return None

    def _base(self) -> Tensor | None:
        """Return the base value in the units of the link, of the model as it is now."""
        return None

    # The torch model.

    def _torch_model(self) -> TorchModel | None:
        """Return the torch model behind, looked for and checked once."""
        if self._bound:
            return self._torch
        function = stock_function(self._held())
        sample = self._sample()
        self._roots = modules_of(function, self._given)
        with held(self._modules()):
            found = torch_model_behind(self._held(), self._given)
            if found is None and callable(function):
                if sample is not None:
                    found = returns_tensors(function, sample)
                else:
                    found = TorchModel(function, converts=False)
            elif found is not None and found.converts and found.function is not function:
                if sample is not None:
                    found.agree(function, sample)
                else:
                    self._unchecked = True
            if found is not None:
                self._roots = modules_of(self._held(), found.function)
        self._torch, self._bound = found, True
        return found

    def _modules(self) -> Iterator[nn.Module]:
        """Every module that the search found; others show when they run."""
        for root in self._roots:
            yield from root.modules()

    def _check_on(self, arguments: Sequence[Any]) -> None:
        """Check a model for which there was no sample on the first rows that come along."""
        if self._unchecked and self._torch is not None:
            self._torch.agree(stock_function(self._held()), arguments)
            self._unchecked = False

    def _model(self) -> TorchModel:
        model = self._torch_model()
        if model is None:
            raise no_torch_model(self._stock.__name__)
        return model

    @contextmanager
    def _still(self) -> Iterator[None]:
        if self._is_still:
            yield
            return
        self._torch_model()
        with held(self._modules()):
            yield

    # As SHAP.

    @property
    def expected_value(self) -> Any:
        """The base value, of the model as it is now and in the units of the link."""
        if self._torch_model() is not None:
            with self._still(), torch.no_grad():
                base = self._base()
            if base is not None:
                return number_of(base)
        return self.__dict__.get("expected_value")

    @expected_value.setter
    def expected_value(self, value: Any) -> None:
        self.__dict__["expected_value"] = value

    @leaves_inference_mode
    def _explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run SHAP's own ``__call__``, and put the tensors of its rows beside the result."""
        if self._torch_model() is None:
            return with_tensors(self._stock.__call__(self, *args, **kwargs), None, None)
        with self._still():
            worker = self._worker(args)
            explanation = self._stock.__call__(worker, *map(_array, args), **kwargs)
        self._take_results(worker)
        if worker._whole is None:
            return _beside(explanation, worker._rows)
        values, base = worker._whole
        self._compare(values, base, explanation.values)
        if values.shape != explanation.values.shape:
            values = values.reshape(explanation.values.shape)
        return with_tensors(explanation, values, base.expand(len(values), *base.shape))

    def _worker(self, args: tuple[Any, ...]) -> Any:
        """Return what runs SHAP's code in one call: with ``_whole``, or remembering its rows."""
        worker = copy.copy(self)
        worker._rows, worker._whole, worker._inputs, worker._is_still = [], None, args, True
        self._check_constants(args)
        return worker

    def _check_constants(self, args: tuple[Any, ...]) -> None:
        if any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self._check_input_graph()

    def _as_stock(self) -> Any:
        """Return SHAP's own explainer with the attributes of this one."""
        twin = self._stock.__new__(self._stock)
        vars(twin).update(vars(self))
        return twin

    def _take_results(self, worker: Any) -> None:
        """Keep what SHAP's code leaves on its explainer for users to read."""
        for name in self._results:
            if name in vars(worker):
                setattr(self, name, vars(worker)[name])

    def _check_input_graph(self) -> None:
        """Refuse inputs with a graph where a method takes them as constants."""
        raise NotDifferentiableError(
            expected_found(
                f"`inputs` of {self._stock.__name__}",
                "inputs that require no gradient",
                "some that do",
                "They go through NumPy and are constants to it: detach them.",
            )
        )

    def _remember(self, values: Tensor, base: Tensor, stock: Any) -> None:
        """Keep one row, after a comparison with the numbers of SHAP's own code."""
        self._compare(values, base, stock)
        if self._rows is not None:
            self._rows.append((values, base))

    def _compare(self, values: Tensor, base: Tensor, stock: Any) -> None:
        ours = values.detach().double().cpu().numpy()
        theirs = np.asarray(stock, dtype=float).reshape(ours.shape)
        difference = float(np.abs(ours - theirs).max(initial=0))
        if not difference:
            return
        scale = float(np.abs(theirs).max(initial=1e-30))
        if difference > _REPLAYS * scale:
            scale = max(scale, float(base.detach().abs().max()))
        if difference > _REPLAYS * scale:
            raise NotDifferentiableError(
                expected_found(
                    self._stock.__name__,
                    "the arithmetic of the SHAP versions that this adapter is made for",
                    f"values that differ by {difference:.3g} at a scale of {scale:.3g}",
                    "Use a SHAP version that pyproject.toml names.",
                )
            )

    # As Captum.

    @leaves_inference_mode
    @marks_start
    def _attribute(self, inputs: TensorOrTuple, target: Any, options: dict[str, Any]) -> Any:
        check_inputs(inputs)
        tensors = as_tuple(inputs)
        check_target(target, tensors[0].shape[0])
        self._model()
        values = self._values(tensors, target, options)
        return like_inputs(
            inputs,
            tuple(
                v.to(t) if t.is_floating_point() else v
                for v, t in zip(values, tensors, strict=True)
            ),
        )

    def _values(
        self, tensors: tuple[Tensor, ...], target: Any, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Attributions of the target, one tensor for each input."""
        explanations = self(*tensors, **options)  # type: ignore[operator]  # from SHAP's class
        each = explanations if isinstance(explanations, list) else [explanations]
        return tuple(select_output(e.tensor, t, target) for e, t in zip(each, tensors, strict=True))


def number_of(base: Tensor) -> Any:
    """Return a base value as SHAP holds it: a float, or an array of several outputs'."""
    value = base.detach().double().cpu().numpy()
    return float(value) if value.ndim == 0 else value


def _array(argument: Any) -> Any:
    """Give SHAP an array in place of a tensor."""
    return argument.detach().cpu().numpy() if isinstance(argument, Tensor) else argument


def table_of(args: tuple[Any, ...]) -> np.ndarray | None:
    """Return the rows of one call as one table of numbers, where they are one."""
    if len(args) != 1 or not any(hasattr(args[0], name) for name in ("__array__", "toarray")):
        return None
    table: np.ndarray = as_array(_array(args[0]))
    return table.astype(float) if table.ndim == 2 and table.dtype.kind in "fiub" else None


def _beside(explanations: Any, rows: list[tuple[Tensor, Tensor]] | None) -> Any:
    """Put the rows' tensors beside one Explanation, or each of one for each argument."""
    if not rows:
        return with_tensors(explanations, None, None)
    if not isinstance(explanations, list) and np.shape(explanations.values) == rows[0][0].shape:
        return with_tensors(explanations, *rows[0])  # a row without a batch axis
    each = explanations if isinstance(explanations, list) else [explanations]
    places = [0] * len(rows)
    for explanation in each:
        parts = []
        for i, (values, _) in enumerate(rows):
            shape = np.shape(explanation.values[i])
            outputs = values.shape[-1] if values.dim() > 1 else 1
            n = int(np.prod(shape)) // max(outputs, 1) if len(each) > 1 else values.shape[0]
            parts.append(values[places[i] : places[i] + n].reshape(shape))
            places[i] += n
        ragged = len({p.shape for p in parts}) > 1
        base = torch.stack([b for _, b in rows])
        if np.size(explanation.base_values) == base.numel():
            base = base.reshape(np.shape(explanation.base_values))
        # Ragged ones stay a list, as SHAP's values do.
        with_tensors(explanation, parts if ragged else torch.stack(parts), base)  # type: ignore[arg-type]  # a list where ragged
    return explanations


def select_output(values: Tensor, like: Tensor, target: Any) -> Tensor:
    """Pick the target's attributions off the last axis, where SHAP has one for the outputs."""
    n = like.shape[0]
    if values.dim() == like.dim():
        values = values.unsqueeze(-1)
    chosen = output_index(target, n, values.shape[-1])
    if isinstance(chosen, int):
        return values[..., chosen]
    index = chosen.to(values.device).reshape(n, *[1] * (values.dim() - 1))
    return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)


def output_index(target: Any, n_examples: int, n_outputs: int) -> int | Tensor:
    """Read Captum's spellings of a target as the index of one output, or one for each example."""
    if target is None:
        if n_outputs > 1:
            raise ValueError(
                expected_found(
                    "`target`",
                    f"which of the {n_outputs} outputs to explain",
                    "None",
                    "Pass target=... (a class index, or one for each example).",
                )
            )
        return 0
    flat = _flat(target)
    low, high = int(flat.min()), int(flat.max())
    if low < -n_outputs or high >= n_outputs:
        raise ValueError(
            expected_found(
                "`target`",
                f"indices of the {n_outputs} outputs",
                str(low if low < -n_outputs else high),
                "SHAP explains models whose output is one number or one vector for each row.",
            )
        )
    if flat.numel() == 1:
        return int(flat) % n_outputs
    return flat % n_outputs


def _flat(target: Any) -> Tensor:
    if isinstance(target, tuple):
        target = [target]
    if isinstance(target, list) and isinstance(target[0], tuple):
        if any(len(t) != 1 for t in target):
            raise ValueError(
                expected_found(
                    "`target`",
                    "one index into the outputs",
                    f"tuples of {len(target[0])}",
                    "SHAP explains models whose output is one vector for each row.",
                )
            )
        target = [t[0] for t in target]
    return torch.as_tensor(target).reshape(-1).long().cpu()
