"""Checks at the public edge: what a user passed, before anything is computed or changed."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captum_priors._errors import TargetError, refusal, type_of
from captum_priors._types import OutputTarget

# ---- The batch -----------------------------------------------------------------------------


def check_tensors(inputs: Any) -> None:
    """Require a tensor, or a tuple of at least one."""
    # A packed sequence is a tuple, too.
    several = isinstance(inputs, tuple) and len(inputs) and not isinstance(inputs, PackedSequence)
    for i, tensor in enumerate(inputs if several else (inputs,)):
        if not isinstance(tensor, Tensor):
            what = f"`inputs[{i}]`" if several else "`inputs`"
            raise refusal(
                TypeError,
                what,
                "a torch.Tensor",
                type_of(tensor),
                "Pass the tensor that the model is called with: torch.as_tensor(...) of an array. "
                "Pass a tuple of tensors for several inputs, and for a packed sequence the padded "
                "tensor, with the lengths in additional_forward_args.",
            )


def check_inputs(inputs: Any) -> int:
    """Require a tensor, or a tuple of tensors of one non-empty batch; return its length."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        check_tensors(inputs)
    (n,) = tensors[0].shape[:1] or (0,)
    for i, tensor in enumerate(tensors):
        if n == 0 or tensor.shape[:1] != (n,):
            raise refusal(
                ValueError,
                f"`inputs[{i}]`" if isinstance(inputs, tuple) else "`inputs`",
                "a non-empty batch (dimension 0)" + (f" of {n} as in `inputs[0]`" if i else ""),
                f"shape {tuple(tensor.shape)}",
                "Skip empty batches; unsqueeze a single example.",
            )
    return n


def check_floating(tensors: Sequence[Tensor]) -> None:
    """Require floating-point tensors: others have no gradient."""
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise refusal(
                TypeError,
                f"`inputs[{i}]`",
                "a floating-point tensor",
                tensor.dtype,
                "Images and counts: inputs.float(), scaled as the model expects. Token ids have no "
                "gradient: explain their embeddings, with LayerExpectedGradients or by passing the "
                "embeddings as inputs.",
            )


def check_target(
    target: Any, n_examples: int, *, several: bool = True, labels: bool = False
) -> None:
    """Require one target for all examples, or one for each; or ``several``, a map for each.

    ``labels`` says that class labels are wanted, for what to do about others.
    """
    if target is None or (isinstance(target, (int, tuple)) and not isinstance(target, bool)):
        return
    if isinstance(target, OutputTarget):
        if not several and target.several:
            raise refusal(
                TargetError,
                "`target`",
                "one output, or one sum of them, for each example",
                repr(target),
                "Call it for one output after another.",
            )
        target.check(n_examples)
        return
    if isinstance(target, Tensor):
        if target.dtype == torch.long and target.shape == (n_examples,):
            return
        if target.dim() > 1:
            raise _several_targets(target, labels)
        length, found = n_examples if target.numel() == 1 else len(target), str(target.dtype)
        whole = not target.is_floating_point() and target.dtype != torch.bool
    elif isinstance(target, list):
        odd = [type_of(t) for t in target if not isinstance(t, (int, tuple))]
        length, whole, found = len(target), not odd, f"a list with a {'/'.join(odd[:1])}"
    else:
        length, whole, found = n_examples, False, type_of(target)
    if not whole:
        raise refusal(
            TypeError,
            "`target`",
            "integer class indices",
            found,
            "For regression with one output leave target out; otherwise pass an int, a tuple of "
            "ints, or class indices, torch.as_tensor(target).long().",
        )
    if length != n_examples:
        raise refusal(
            TargetError,
            "`target`",
            f"one for each of the {n_examples} examples",
            length,
            "Match it to the rows of the inputs.",
        )


def _several_targets(target: Tensor, labels: bool) -> TargetError:
    if target.dim() == 2 and target.shape[1] == 1:
        remedy = "Pass class indices of shape (batch,), target.flatten()."
    elif target.dim() > 2:
        remedy = (
            "It selects one output for each example. For labels of each pixel pass the index of "
            "one output, target=(class, row, column), or a sum of those that are meant, "
            "captum_priors.outputs.total(mask)."
        )
    else:
        remedy = (
            "It takes one class label for each example. Of a model with several labels explain "
            "one after another: lambda x: model(x)[:, k], with target=labels[:, k]."
            if labels
            else "It selects one output for each example. If examples have several labels, pass "
            "the sum of theirs, captum_priors.outputs.weighted(labels), or one map for each "
            "output, captum_priors.outputs.each()."
        )
        if bool((target != 0).sum(1).eq(1).all()):
            remedy = f"One-hot rows are target.argmax(1). {remedy}"
    expected, found = "at most one dimension", f"shape {tuple(target.shape)}"
    return refusal(TargetError, "`target`", expected, found, remedy)


def check_labels(target: Any) -> None:
    """Require class labels as the target."""
    if target is None or isinstance(target, (tuple, OutputTarget)):
        raise refusal(
            ValueError,
            "`target`",
            "the class labels",
            repr(target),
            "Pass target=y, shape (batch,).",
        )


def check_annotation(name: str, value: Any, n: int) -> None:
    """Require an entry for each example, unless it is said that there is one for all."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, Tensor) and each.shape[:1] != (n,):
            raise refusal(
                ValueError,
                f"`{name}`",
                f"an entry for each of the {n} examples",
                f"shape {tuple(each.shape)}",
                "Wrap what is one for the whole batch: captum_priors.shared(...).",
            )


def check_keywords(prior: Any, baselines: Any, annotations: dict[str, Any]) -> None:
    """Refuse baselines or annotations that nobody would look at."""
    given = [*annotations] if baselines is None else ["baselines", *annotations]
    for name in given:
        if not prior.takes(name):
            raise refusal(
                TypeError,
                f"prior {prior!r}",
                "keywords that a term of it takes",
                repr(name),
                "Leave it out, or use a penalty that declares it.",
            )


def check_number(name: str, value: Any) -> Tensor:
    """Require a floating-point tensor of one element, and return it with shape ``()``."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = type_of(value)
        if isinstance(value, Tensor):
            found = f"shape {tuple(value.shape)}, {value.dtype}"
        remedy = "Return the loss as a tensor, reduced to one number."
        raise refusal(ValueError, name, "one number", found, remedy)
    return value.sum()


# ---- Options -------------------------------------------------------------------------------


def check_name(name: Any) -> None:
    """Require something that a logger can show, where there is a name."""
    if name is not None and not (isinstance(name, str) and any(c.isalnum() for c in name)):
        remedy = "Pass for example name='sparse'."
        raise refusal(ValueError, "`name`", "a word, or None", repr(name), remedy)


def check_forward_func(forward_func: Any) -> None:
    """Require a model or another function of the inputs, rather than a class or an explainer."""
    if isinstance(forward_func, type) or not callable(forward_func):
        raise refusal(
            TypeError,
            "`forward_func`",
            "a model or another callable",
            type_of(forward_func),
            "Pass the model itself, not its class, its output or an explainer of it.",
        )


def check_module(name: str, value: Any, remedy: str = "Pass model.some_layer.") -> None:
    """Require a module, rather than its name or parameters."""
    if not isinstance(value, nn.Module):
        raise refusal(TypeError, f"`{name}`", "a torch.nn.Module", type_of(value), remedy)


def count(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """Require an integer of at least ``least``, and of at most ``most``, and return it."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        expected = f"an integer of at least {least}"
        expected += "" if most is None else f" and at most {most}"
        raise refusal(ValueError, f"`{name}`", expected, repr(value), f"Pass {name}={least}.")
    return int(value)


def positive(name: str, value: Any, *, example: float = 0.1) -> float:
    """Require a positive finite number, and return it."""
    return _number(name, value, lambda v: v > 0, "a positive finite number", example)


def nonnegative(name: str, value: Any) -> float:
    """Require a finite number of at least 0, and return it."""
    return _number(name, value, lambda v: v >= 0, "a finite number of at least 0", 0.1)


def fraction(name: str, value: Any) -> float:
    """Require a number in (0, 1], and return it."""
    return _number(name, value, lambda v: 0 < v <= 1, "a number in (0, 1]", 0.25)


def share(name: str, value: Any) -> float:
    """Require a number in [0, 1], and return it."""
    return _number(name, value, lambda v: 0 <= v <= 1, "a number in [0, 1]", 0.5)


def _number(
    name: str, value: Any, allowed: Callable[[float], bool], expected: str, example: float
) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not allowed(float(value)) or float(value) == float("inf"):
        remedy = f"Pass for example {name}={example:g}."
        raise refusal(ValueError, f"`{name}`", expected, repr(value), remedy)
    return float(value)


# ---- Reference rows ------------------------------------------------------------------------


def check_distribution(baselines: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Require a non-empty set of reference rows for each input; numbers become one row."""
    if len(baselines) != len(inputs):
        raise refusal(
            ValueError,
            "`baselines`",
            f"{len(inputs)} tensors, one for each input",
            len(baselines),
            "Pass a tuple with one distribution of reference rows for each input.",
        )
    return tuple(map(_distribution, range(len(inputs)), baselines, inputs))


def _distribution(place: int, baseline: Any, inputs: Tensor) -> Tensor:
    what = f"`baselines[{place}]`"
    if isinstance(baseline, (int, float)) and not isinstance(baseline, bool):
        return torch.full_like(inputs[:1], baseline, requires_grad=False)
    if not isinstance(baseline, Tensor):
        raise refusal(
            TypeError,
            what,
            "a tensor of reference rows",
            type_of(baseline),
            "Pass for example a few hundred training examples stacked along dimension 0.",
        )
    row, found = inputs.shape[1:], baseline.shape
    if found[1:] != row or not found or found[0] == 0:
        raise refusal(
            ValueError,
            what,
            f"at least one reference row, rows of shape {tuple(row)} as in the inputs",
            f"shape {tuple(found)}",
            "Add the first dimension, which counts reference rows, with unsqueeze(0); to a single "
            "example add the batch dimension, inputs.unsqueeze(0); if these are labels, pass them "
            "as target=....",
        )
    if (baseline.dtype, baseline.device) != (inputs.dtype, inputs.device):
        raise refusal(
            TypeError,
            what,
            f"{inputs.dtype} on {inputs.device} as in the inputs",
            f"{baseline.dtype} on {baseline.device}",
            "Convert it once with .to(inputs).",
        )
    return baseline
