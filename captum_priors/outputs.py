r"""Targets of many outputs, where an index of one says too little: dense and multi-label models.

Captum's targets select one output :math:`f_k` of each example. These are passed in their place,
to every explainer and prior:

- ``total(mask)``, the sum of the outputs that a mask selects, :math:`\sum_{k \in M} f_k`: of a
  segmentation, what pixels and classes are given together;
- ``weighted(weights)``, :math:`\sum_k w_k f_k`: of a multi-label model, what the labels of an
  example are given;
- ``each()``, one map for each output. An explainer returns attributions ``(batch, outputs, ...)``;
  a prior returns the mean over the outputs of what it says of each alone, as a target of its own,
  with the same random draws.

Gradients of ``each()`` share one forward pass in ``ExpectedGradients``, ``LayerExpectedGradients``,
``Saliency``, ``InputXGradient`` and ``IntegratedGradients``; SHAP's explainers run once; others
explain one output after another. An explainer that brings its own graph is given sums as they are,
and finds them in the model's outputs with ``target.select(outputs)``, of shape ``(rows,)``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_priors._checks import check_annotation, check_target
from captum_priors._errors import TargetError, refusal, type_of
from captum_priors._rows import run_forward, selected, shared
from captum_priors._types import OutputTarget
from captum_priors.engine.random import GlobalState

__all__ = ["each", "total", "weighted"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False, repr=False)
class SumOfOutputs(OutputTarget):
    """What ``total`` and ``weighted`` make."""

    weights: Any  # a tensor with an entry for each example, a shared one, or None for all outputs
    function: str
    argument: str

    def check(self, n_examples: int) -> None:
        """Require weights for each example, or shared ones."""
        check_annotation(self.argument, self.weights, n_examples)

    def mapped(self, function: Callable[[Any], Any]) -> "SumOfOutputs":
        """Apply a function to what has an entry for each example."""
        return replace(self, weights=function(self.weights))

    def select(self, outputs: Tensor) -> Tensor:
        """Add up the outputs of each row, in at least single precision."""
        weights = self._fitting(outputs)
        if outputs.dtype in _HALF:
            outputs = outputs.float()
        if weights is not None:
            outputs = torch.where(weights != 0, outputs, 0)  # -inf that is not asked for counts not
            if weights.dtype != torch.bool:
                outputs = outputs * weights.to(outputs.dtype)
        return outputs.reshape(len(outputs), -1).sum(1)

    def spread(self, outputs: Tensor) -> Tensor:
        """Return the weight of each output, in their shape."""
        weights = self._fitting(outputs)
        if weights is None:
            return torch.ones_like(outputs)
        return weights.to(outputs.dtype).expand_as(outputs)

    def _fitting(self, outputs: Tensor) -> Tensor | None:
        if self.weights is None:
            return None
        one = isinstance(self.weights, shared)
        weights: Tensor = self.weights.value.unsqueeze(0) if one else self.weights
        if weights.is_inference() and not torch.is_inference_mode_enabled():
            weights = weights.clone()
        sizes = zip(weights.shape[1:], outputs.shape[1:], strict=False)
        alike = weights.dim() == outputs.dim() and all(a in (1, b) for a, b in sizes)
        if not (alike and (one or len(weights) == len(outputs))) or (
            weights.device != outputs.device
        ):
            raise refusal(
                TargetError,
                f"`{self.argument}`",
                f"a tensor that goes with outputs of shape {tuple(outputs.shape)} on "
                f"{outputs.device}",
                f"{self!r} on {weights.device}",
                "Give it their dimensions, of size 1 where entries are the same, mask.unsqueeze(1) "
                "for all classes of a pixel; shared(...) has none for the examples.",
            )
        return weights

    def __repr__(self) -> str:
        one = isinstance(self.weights, shared)
        value = self.weights.value if one else self.weights
        found = "" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
        return f"{self.function}({f'shared({found})' if one else found})"


@dataclass(frozen=True, eq=False, repr=False)
class SeveralOutputs(OutputTarget):
    """What ``each`` makes."""

    several: ClassVar[bool] = True
    targets: tuple[Any, ...] | None  # None for all, until the outputs are known

    def check(self, n_examples: int) -> None:
        """Require targets that are right by themselves."""
        for target in self.targets or ():
            check_target(target, n_examples, several=False)

    def mapped(self, function: Callable[[Any], Any]) -> "SeveralOutputs":
        """Apply a function to what has an entry for each example."""
        return self if self.targets is None else SeveralOutputs(tuple(map(function, self.targets)))

    def select(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Select one number for each row, of each target."""
        return tuple(selected(outputs, target) for target in self.targets or ())

    def known(
        self, forward_func: Any, inputs: tuple[Any, ...], args: tuple[Any, ...]
    ) -> "SeveralOutputs":
        """Return the targets by themselves; where all outputs are meant, run the model to see."""
        if self.targets is not None:
            return self
        if forward_func is None:
            raise refusal(
                TargetError,
                "`target`",
                "outputs by name, because the explainer does not say what its model is",
                repr(self),
                "Pass for example each(range(10)).",
            )
        state = GlobalState.now()
        with torch.no_grad():
            shape = run_forward(forward_func, inputs, None, args).shape[1:]
        state.restore()
        if len(shape) == 1:
            return SeveralOutputs(tuple(range(shape[0])))
        return SeveralOutputs(tuple(product(*map(range, shape))) if shape else (None,))

    def explained(self, explain: Callable[[Any], Any], draws: Sequence[str]) -> Any:
        """Explain one after another, with the same draws, and stack what comes out."""
        state, found = GlobalState.now(draws), []
        for target in self.targets or ():
            state.restore()
            found.append(explain(target))
        return stacked(found)

    def grouped(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Stack the tensors of all targets, which follow one another."""
        times = len(values) // len(self)
        return tuple(torch.stack(values[i::times], 1) for i in range(times))

    def __len__(self) -> int:
        return len(self.targets or ())

    def __repr__(self) -> str:
        return "each()" if self.targets is None else f"each({[*self.targets]!r})"


def each(targets: Sequence[Any] | None = None) -> SeveralOutputs:
    r"""One map for each output, in one call: attributions ``(batch, outputs, ...)``.

    A prior's value is the mean over the outputs of its values for each of them.

    Args:
        targets: Which outputs: a list of targets, sums of this module among them; by default all
            of them, those of a dense model in the order of its flattened outputs.

    Raises:
        TypeError: If it is no list of targets.

    Example:
        The maps of a linear model's outputs are its Jacobian, whatever the input.

        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors import AttributionPrior, differentiable
        >>> from captum_priors.outputs import each
        >>> from captum_priors.penalties import l2
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
        >>> maps = differentiable(Saliency(model)).attribute(x, target=each(), abs=False)
        >>> torch.equal(maps, model.weight.expand(5, 3, 4))
        True
        >>> prior = AttributionPrior(Saliency(model), l2)
        >>> alone = torch.stack([prior(x, target=k) for k in range(3)])
        >>> torch.allclose(prior(x, target=each()), alone.mean())
        True
    """
    if targets is None:
        return SeveralOutputs(None)
    several = isinstance(targets, (list, tuple, range)) and len(targets) > 0
    if not several or any(isinstance(t, SeveralOutputs) for t in targets):
        found = repr(targets) if isinstance(targets, (list, tuple)) else type_of(targets)
        raise refusal(
            TypeError,
            "`targets`",
            "a list of targets, at least one, each of one output or a sum",
            found,
            "Pass for example each([0, 2]), or each() for all outputs.",
        )
    return SeveralOutputs(tuple(targets))


def total(mask: Any = None) -> SumOfOutputs:
    r"""The sum of the outputs that a mask selects: :math:`\sum_{k \in M_i} f_k(x_i)`.

    For a segmentation this is the target of Seg-Grad-CAM (Vinogradova, Dibrov, Myers 2020).

    Args:
        mask: Booleans with the dimensions of the outputs, ``(batch, classes, height, width)`` say,
            of size 1 where entries are the same; ``shared(mask)``, without the first, for all
            examples. By default all outputs.

    Raises:
        TypeError: If it is no tensor of booleans.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors import differentiable
        >>> from captum_priors.outputs import total
        >>> net, images = torch.nn.Conv2d(1, 2, 1), torch.rand(3, 1, 4, 4)
        >>> logits = net(images)
        >>> predicted = torch.nn.functional.one_hot(logits.argmax(1), 2).movedim(-1, 1).bool()
        >>> torch.allclose(total(predicted).select(logits), logits.amax(1).sum((1, 2)))
        True
        >>> maps = differentiable(Saliency(net)).attribute(images, target=total(predicted))
        >>> maps.shape
        torch.Size([3, 1, 4, 4])
    """
    value = mask.value if isinstance(mask, shared) else mask
    if mask is not None and not (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise refusal(
            TypeError,
            "`mask`",
            "a tensor of booleans, or shared(...) of one",
            value.dtype if isinstance(value, Tensor) else type_of(value),
            "Pass mask.bool(), or weights that are no mask to weighted(...).",
        )
    return SumOfOutputs(mask, "total", "mask")


def weighted(weights: Any) -> SumOfOutputs:
    r"""A weighted sum of outputs: :math:`\sum_k w_{ik} f_k(x_i)`.

    Args:
        weights: Numbers with the dimensions of the outputs, ``(batch, labels)`` say, of size 1
            where entries are the same; ``shared(weights)``, without the first, for all examples.

    Raises:
        TypeError: If it is no tensor.

    Example:
        >>> import torch
        >>> from captum_priors import ExpectedGradients
        >>> from captum_priors.outputs import weighted
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
        >>> labels = torch.tensor([[1, 0, 1]]).expand(5, 3).float()
        >>> maps = ExpectedGradients(model).attribute(x, 0 * x, target=weighted(labels))
        >>> torch.allclose(maps, x * (model.weight[0] + model.weight[2]), atol=1e-6)
        True
    """
    value = weights.value if isinstance(weights, shared) else weights
    if not isinstance(value, Tensor):
        raise refusal(
            TypeError,
            "`weights`",
            "a tensor, or shared(...) of one",
            type_of(value),
            "Convert it with torch.as_tensor(..., dtype=..., device=...).",
        )
    return SumOfOutputs(weights, "weighted", "weights")


def stacked(found: Sequence[Any]) -> Any:
    """Stack results of one structure, tensor by tensor, along a dimension behind the examples."""
    first = found[0]
    if isinstance(first, (tuple, list)):
        return type(first)(stacked(entries) for entries in zip(*found, strict=True))
    return torch.stack(list(found), 1)


def mean_of(scores: Sequence[Any]) -> Any:
    """Average scores of several outputs; what is no tensor is refused by whoever reduces."""
    if not all(isinstance(score, Tensor) for score in scores):
        return scores[0]
    return torch.stack(list(scores)).mean(0)


def taken(maps: Any, which: int) -> Any:
    """Return the maps of one output from those of all."""
    if isinstance(maps, tuple):
        return tuple(taken(entry, which) for entry in maps)
    return maps.select(1, which)


def scores_of_each(term: Any, call: Any) -> Any:
    """Return the mean over several outputs of a prior's scores of each, with the same draws."""
    scores = []
    for one in outputs_of(term, call).targets or ():
        call.explaining.seed(call.seed)
        scores.append(term._scores(replace(call, target=one)))
    return mean_of(scores)


def outputs_of(term: Any, call: Any) -> SeveralOutputs:
    """Return the call's several outputs, counted where all are meant."""
    model = next(iter(term.models()), None)
    found: SeveralOutputs = call.target.known(model, call.inputs, call.args)
    return found
