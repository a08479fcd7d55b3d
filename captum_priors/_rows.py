"""The examples of a batch: what travels with them, and the model as a function of their rows."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._captum import (
    logits_of,
    output_error,
    run_function,
    select_error,
    select_targets,
)
from captum_priors._types import OutputTarget
from captum_priors.engine import current_pass, refuse_coupled_examples, submodules_of
from captum_priors.engine.coupled import refuse_batch_statistics
from captum_priors.engine.gradients import recording
from captum_priors.engine.modules import ReluMode, current_beta


@dataclass(frozen=True)
class shared:  # noqa: N801  # reads as the function that it is used as
    """Mark an annotation that is one for the whole batch, instead of an entry for each example.

    Priors pass its value on whole, whatever its shape; a shared ``annotation``, of which every
    penalty wants one for each example, is repeated for them.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients, shared
        >>> def weighted(attributions, *, weights):
        ...     return (attributions.abs() * weights).sum(1)
        >>> x = torch.randn(4, 4)
        >>> explainer = ExpectedGradients(torch.nn.Linear(4, 1))
        >>> prior = AttributionPrior(explainer, weighted, baselines=x)
        >>> prior(x, weights=shared(torch.zeros(4))).item()
        0.0
    """

    value: Any


def take(value: Any, rows: slice | Tensor, n_examples: int) -> Any:
    """Select examples of a value that has one entry for each, return anything else unchanged."""
    if isinstance(rows, slice) and rows == slice(0, n_examples):
        return value
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 0 and value.shape[0] == n_examples else value
    if isinstance(value, list) and len(value) == n_examples:
        if isinstance(rows, slice):
            return value[rows]
        return [value[i] for i in rows.tolist()]
    if isinstance(value, OutputTarget):
        return value.mapped(lambda own: take(own, rows, n_examples))
    return value


def take_each(values: Any, rows: slice | Tensor, n_examples: int) -> Any:
    """Select examples of a value, or of each entry of a tuple of them."""
    if isinstance(values, tuple):
        return tuple(take(value, rows, n_examples) for value in values)
    return take(values, rows, n_examples)


def for_each(function: Callable[[Tensor], Tensor], values: Any, n_examples: int) -> Any:
    """Apply a function to the tensors that have one entry for each example, among them or alone."""
    if isinstance(values, tuple):
        return tuple(for_each(function, value, n_examples) for value in values)
    if isinstance(values, Tensor) and values.dim() > 0 and values.shape[0] == n_examples:
        return function(values)
    return values


def tile(value: Any, times: int, n_examples: int) -> Any:
    """Repeat a value that has one entry for each example, as a whole, ``times`` times."""
    if times == 1:
        return value
    if isinstance(value, Tensor):
        if value.dim() > 0 and value.shape[0] == n_examples:
            return torch.cat([value] * times)
        return value
    if isinstance(value, OutputTarget):
        return value.mapped(lambda own: tile(own, times, n_examples))
    return value * times if isinstance(value, list) and len(value) == n_examples else value


def carried(inputs: Sequence[Tensor], points: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Points found near the inputs, which go where those go: what was added is the constant."""
    pairs = zip(inputs, points, strict=True)
    return tuple(p.detach() + (x - x.detach()) if x.requires_grad else p.detach() for x, p in pairs)


def length_of(rows: slice, n_examples: int) -> int:
    """Count the examples that a slice selects."""
    return len(range(*rows.indices(n_examples)))


@dataclass(frozen=True)
class Rows:
    """The explained output at points that repeat the examples of a batch any number of times.

    The one place where this package runs a model: on copies, which it may work in place on.
    """

    forward_func: Any
    target: Any
    args: tuple[Any, ...]
    n: int

    def __call__(self, points: tuple[Any, ...]) -> Any:
        """Return the target output of each row, selected as Captum does; a tuple of several."""
        times = points[0].shape[0] // self.n if self.args or self.target is not None else 1
        args = tuple([tile(arg, times, self.n) for arg in self.args]) if self.args else ()
        run, k = self.forward_func, len(points)
        if not isinstance(run, nn.Module):

            def run(*passed: Any) -> Any:
                # Captum looks at the signature, for functions of nothing.
                return run_function(self.forward_func, passed[:k], None, passed[k:] or None)

        current, constant = current_pass(), torch.is_grad_enabled()
        held = None if current is None else current.statistics
        # Finite differences have statistics in full precision, in which they are evaluated alone.
        full = current is None or current.exact or recording() is not None
        model, given = self.forward_func if full else None, list[Any]()
        for point in points:
            given.append(point.clone() if isinstance(point, Tensor) else point)
            constant = constant and getattr(point, "is_leaf", True)
        with nullcontext() if held is None else held.on_rows(model, points):
            if current is None or current.exact:
                # Nobody asks for a second derivative by leaves: no graph through its zeros.
                with ReluMode(current_beta()) if constant else nullcontext():
                    output = run(*given, *args)
            else:  # compiled modules, which run here, warn of copies of leaves that torch protects
                guarded = torch.is_grad_enabled()
                leaves = [guarded and getattr(p, "is_leaf", 0) and p.requires_grad for p in points]
                plain = [p if leaf else g for p, g, leaf in zip(points, given, leaves, strict=True)]
                try:
                    output = run(*plain, *args)
                except RuntimeError as error:
                    if "leaf Variable that requires grad" not in str(error):
                        raise
                    output = run(*given, *args)
        output = output if isinstance(output, Tensor) else logits_of(output)
        if not isinstance(output, Tensor):
            raise select_error(output, self.target)
        if self.target is None:
            return output
        if output.dim() == 0 or output.shape[0] != points[0].shape[0]:
            raise output_error(output, points[0].shape[0])
        return selected(output, tile(self.target, times, self.n))

    def of(self, examples: slice) -> "Rows":
        """Return the same for some of the examples."""
        if examples == slice(0, self.n):
            return self
        return Rows(
            self.forward_func,
            take(self.target, examples, self.n),
            tuple(take(arg, examples, self.n) for arg in self.args),
            length_of(examples, self.n),
        )

    def refuse_coupled(self, inputs: tuple[Tensor, ...], *, always: bool = False) -> None:
        """Refuse examples that influence each other, where their rows are about to be stacked.

        Asked once, by priors; what is asked directly may explain models that couple them, as
        Captum's classes do, but not (``always``) where the gradient comes later.
        """
        current = current_pass()
        if current is None or current.seen.judged or self.n < 2:
            return
        if not (always or current.holds):
            return
        if not current.holds:
            refuse_batch_statistics(submodules_of(self.forward_func))

        def run(rows: slice) -> Tensor:
            points = (x[rows].detach() for x in inputs)
            found: Tensor = self.of(rows)(
                tuple(p.requires_grad_() if p.is_floating_point() else p for p in points)
            )
            return found.detach()

        refuse_coupled_examples(run, self.n)
        current.seen.judged = True
        if current.statistics is not None:
            current.statistics.begins = False  # those rows were this check's


def run_forward(
    forward_func: Any, inputs: tuple[Any, ...], target: Any, args: tuple[Any, ...]
) -> Tensor:
    """Run a model on copies of its inputs, and select the target outputs."""
    n = inputs[0].shape[0] if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() else 1
    outputs: Tensor = Rows(forward_func, target, args, n)(inputs)
    return outputs


def check_selects(outputs: Tensor, target: Any) -> None:
    """Refuse a target that selects none of the outputs, where all of them are looked at."""
    outputs = outputs.detach()
    if outputs.numel() == len(outputs) and not isinstance(target, OutputTarget):
        outputs = outputs.reshape(-1, 1).expand(-1, 2)  # the logit of a binary classifier
    selected(outputs, target)


def selected(output: Tensor, target: Any) -> Any:
    """Select the target outputs as Captum does, or say what does not fit."""
    if isinstance(target, OutputTarget):
        return target.select(output)
    if isinstance(target, Tensor) and target.numel() > 1 and target.device != output.device:
        raise select_error(output, target)
    try:
        return select_targets(output, target)
    except (AssertionError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise select_error(output, target) from error
