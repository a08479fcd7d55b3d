"""Checks at the public edge: what a user passed, before anything is computed or changed."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from captum_priors._errors import TargetError, expected_found


def check_tensors(inputs: Any) -> None:
    """Require a tensor, or a tuple of at least one."""
    if isinstance(inputs, PackedSequence):  # a tuple, by its type
        raise TypeError(
            expected_found(
                "`inputs`",
                "a torch.Tensor",
                "PackedSequence",
                "Pass the padded tensor, and the lengths in additional_forward_args; pack them "
                "inside forward_func.",
            )
        )
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors:
        raise ValueError(
            expected_found("`inputs`", "at least one tensor", "an empty tuple", "Pass a batch.")
        )
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                expected_found(
                    _named(inputs, i),
                    "a torch.Tensor",
                    type(tensor).__name__,
                    _remedy_of_type(tensor),
                )
            )


def _named(inputs: Any, i: int) -> str:
    return f"`inputs[{i}]`" if isinstance(inputs, tuple) else "`inputs`"


def _remedy_of_type(found: Any) -> str:
    if isinstance(found, list) and any(isinstance(t, Tensor) for t in found):
        return "Pass a tuple of tensors for several inputs."
    if hasattr(found, "__array__") or isinstance(found, (list, int, float)):
        return "Convert it with torch.as_tensor(..., dtype=..., device=...)."
    return "Pass the tensor that the model is called with."


def check_inputs(inputs: Any) -> int:
    """Require a tensor, or a tuple of tensors of one non-empty batch; return its length."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not isinstance(tensors[0], Tensor) or len(tensors) > 1:
        check_tensors(inputs)
    n_examples = tensors[0].shape[:1]
    for i, tensor in enumerate(tensors):
        if tensor.dim() == 0 or tensor.shape[0] == 0:
            raise ValueError(
                expected_found(
                    _named(inputs, i),
                    "a non-empty batch (dimension 0)",
                    f"shape {tuple(tensor.shape)}",
                    "Skip empty batches; unsqueeze a single example.",
                )
            )
        if tensor.shape[:1] != n_examples:
            raise ValueError(
                expected_found(
                    _named(inputs, i),
                    f"{n_examples[0]} examples as in `inputs[0]`",
                    str(tensor.shape[0]),
                    "Inputs of one call share their batch dimension.",
                )
            )
    return int(n_examples[0])


def check_target(target: Any, n_examples: int) -> None:
    """Require one target for all examples, or one for each."""
    if target is None or (isinstance(target, (int, tuple)) and not isinstance(target, bool)):
        return
    if isinstance(target, Tensor):
        if target.dim() == 1 and len(target) == n_examples and target.dtype == torch.long:
            return
        _check_target_tensor(target, n_examples)
    elif isinstance(target, list):
        odd = [t for t in target if not isinstance(t, (int, tuple))]
        if odd:
            raise TypeError(
                expected_found(
                    "`target`",
                    "a list of ints or of tuples of ints",
                    f"one with a {type(odd[0]).__name__}",
                    "Pass torch.as_tensor(target).long(), or plain ints.",
                )
            )
        if len(target) != n_examples:
            raise _other_length(len(target), n_examples)
    else:
        raise TypeError(
            expected_found(
                "`target`",
                "an int, a tuple of ints, a tensor or a list of them",
                type(target).__name__,
                "Pass class indices, torch.as_tensor(target).long().",
            )
        )


def _check_target_tensor(target: Tensor, n_examples: int) -> None:
    if target.dim() > 1:
        several = target.dim() == 2 and bool((target != 0).sum(1).ne(1).any())
        raise TargetError(
            expected_found(
                "`target`",
                "at most one dimension",
                f"shape {tuple(target.shape)}",
                "It selects one output for each example. For labels of several classes or of each "
                "pixel, pass the index of one output, target=(class, row, column), or let "
                "forward_func return the sum of those that are meant."
                if several or target.dim() > 2
                else "Pass class indices of shape (batch,): target.argmax(1) for one-hot rows, "
                "target.flatten() for shape (batch, 1).",
            )
        )
    if target.numel() != 1 and len(target) != n_examples:
        raise _other_length(len(target), n_examples)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(
            expected_found(
                "`target`",
                "integer class indices",
                str(target.dtype),
                "For regression with one output leave target out; otherwise use target.long().",
            )
        )


def _other_length(found: int, n_examples: int) -> TargetError:
    return TargetError(
        expected_found(
            "`target`",
            f"one for each of the {n_examples} examples",
            str(found),
            "Match it to the rows of the inputs.",
        )
    )


def check_forward_func(forward_func: Any) -> None:
    """Require a model or another function of the inputs, rather than a class or an explainer."""
    if isinstance(forward_func, type):
        raise TypeError(
            expected_found(
                "`forward_func`",
                "a model or another callable",
                f"the class {forward_func.__name__}",
                "Pass an instance of it.",
            )
        )
    if not callable(forward_func):
        raise TypeError(
            expected_found(
                "`forward_func`",
                "a model or another callable",
                type(forward_func).__name__,
                "Pass the model itself, not its output or an explainer of it.",
            )
        )


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Require an integer of at least ``least``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(
            expected_found(
                f"`{name}`", f"an integer of at least {least}", repr(value), f"Pass {name}={least}."
            )
        )


def check_labels(target: Any) -> None:
    """Require class labels as the target."""
    if target is None or isinstance(target, tuple):
        raise ValueError(
            expected_found(
                "`target`",
                "the class labels",
                "none" if target is None else "a tuple",
                "Pass target=y, shape (batch,).",
            )
        )


def check_annotation(name: str, value: Any, n: int) -> None:
    """Require an entry for each example, unless it is said that there is one for all."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, Tensor) and each.shape[:1] != (n,):
            raise ValueError(
                expected_found(
                    f"`{name}`",
                    f"an entry for each of the {n} examples",
                    f"shape {tuple(each.shape)}",
                    "Wrap what is one for the whole batch: captum_priors.shared(...).",
                )
            )


def check_floating(tensors: Sequence[Tensor]) -> None:
    """Require floating-point tensors: others have no gradient."""
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise TypeError(
                f"`inputs[{i}]`: expected a floating-point tensor, found {tensor.dtype}. Images "
                "and counts: inputs.float(), scaled as the model expects. Token ids have no "
                "gradient: explain their embeddings, with LayerExpectedGradients or by passing the "
                "embeddings as inputs."
            )


def positive(name: str, value: Any, *, example: float = 0.1) -> float:
    """Require a positive finite number, and return it."""
    return _number(name, value, lambda v: v > 0, "a positive finite number", example)


def nonnegative(name: str, value: Any) -> float:
    """Require a finite number of at least 0, and return it."""
    return _number(name, value, lambda v: v >= 0, "a finite number of at least 0", 0.1)


def fraction(name: str, value: Any) -> float:
    """Require a number in (0, 1], and return it."""
    return _number(name, value, lambda v: 0 < v <= 1, "a number in (0, 1]", 0.25)


def count(name: str, value: Any, *, least: int = 1) -> int:
    """Require an integer of at least ``least``, and return it."""
    check_count(name, value, least=least)
    return int(value)


def _number(
    name: str, value: Any, value_is: Callable[[float], bool], kind: str, example: float
) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not (value_is(float(value)) and float(value) < float("inf"))
    ):
        raise ValueError(
            expected_found(f"`{name}`", kind, repr(value), f"Pass for example {name}={example:g}.")
        )
    return float(value)


def check_distribution(baselines: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Require a non-empty set of reference rows for each input; numbers become one row."""
    if len(baselines) != len(inputs):
        raise ValueError(
            expected_found(
                "`baselines`",
                f"{len(inputs)} tensors, one for each input",
                str(len(baselines)),
                "Pass a tuple with one distribution of reference rows for each input.",
            )
        )
    found = []
    for i, (baseline, tensor) in enumerate(zip(baselines, inputs, strict=True)):
        found.append(_distribution(f"`baselines[{i}]`", baseline, tensor))
    return tuple(found)


def _remedy(baseline: Tensor, inputs: Tensor) -> str:
    if baseline.shape == inputs.shape[1:]:
        return "Add the first dimension, which counts reference rows, with unsqueeze(0)."
    if baseline.shape[1:] == inputs.shape:
        return "The inputs look like one example: add the batch dimension, inputs.unsqueeze(0)."
    if baseline.shape == inputs.shape[:1] and not baseline.is_floating_point():
        return "These look like labels: pass them as target=...."
    return "The first dimension counts reference rows; the others match the inputs."


def check_reference(baseline: Any) -> None:
    """Require a tensor of reference rows, or a number."""
    if not isinstance(baseline, (Tensor, int, float)) or isinstance(baseline, bool):
        raise TypeError(
            expected_found(
                "`baselines`",
                "a tensor of reference rows",
                type(baseline).__name__,
                "Pass for example a few hundred training examples stacked along dimension 0.",
            )
        )


def _distribution(name: str, baseline: Any, inputs: Tensor) -> Tensor:
    check_reference(baseline)
    if not isinstance(baseline, Tensor):
        return torch.full_like(inputs[:1], baseline, requires_grad=False)
    if baseline.shape[1:] != inputs.shape[1:] or baseline.dim() == 0:
        raise ValueError(
            expected_found(
                name,
                f"rows of shape {tuple(inputs.shape[1:])} as in the inputs, shape (n_rows, ...)",
                f"shape {tuple(baseline.shape)}",
                _remedy(baseline, inputs),
            )
        )
    if baseline.shape[0] == 0:
        raise ValueError(
            expected_found(name, "at least one reference row", "none", "Pass a non-empty set.")
        )
    if baseline.dtype != inputs.dtype:
        raise TypeError(
            expected_found(
                name,
                f"dtype {inputs.dtype} as in the inputs",
                str(baseline.dtype),
                f"Convert it with .to({inputs.dtype}).",
            )
        )
    if baseline.device != inputs.device:
        raise ValueError(
            expected_found(
                name,
                f"device {inputs.device} as for the inputs",
                str(baseline.device),
                f"Move it once with .to({str(inputs.device)!r}).",
            )
        )
    return baseline
