"""Say what was passed wrongly where a model, or Captum's own code, fails on it.

Looked into only after a failure, so that nothing is refused that works (a model on several devices,
a model that moves its inputs), nothing is run twice, and a call that succeeds costs nothing.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._captum import select_error
from captum_priors._checks import check_inputs
from captum_priors._errors import TargetError, expected_found

_FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError)
# How torch says that devices or dtypes do not go together.
_DEVICE_SIGNS = ("same device", "on device", "device type", "meta tensor")
_DTYPE_SIGNS = ("dtype", "same type", "scalar type", "should be the same", "expected m1 and m2")


def cause_of(
    error: BaseException, modules: Sequence[nn.Module], given: dict[str, Any]
) -> Exception | None:
    """Return the cause in the package's words, or None for an error whose cause is unknown."""
    if not isinstance(error, _FAILURES) or isinstance(error, torch.cuda.OutOfMemoryError):
        return None
    if ", found " in str(error):  # worded already
        return None
    inputs = given.get("inputs")
    each = inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = [t for t in each if isinstance(t, Tensor)]
    if any(0 in (t.dim(), *t.shape[:1]) for t in tensors):
        try:
            check_inputs(inputs)
        except ValueError as found:
            return found
    return _of_captum(error, tensors, given) or _of_the_model(error, modules, tensors)


def _of_captum(error: Exception, tensors: list[Tensor], given: dict[str, Any]) -> Exception | None:
    """Word failed assertions of Captum's, and its failure to select a target."""
    frames = [f for f in _frames(error) if str(f.f_globals.get("__name__")).startswith("captum.")]
    for frame in reversed(frames):
        if frame.f_code.co_name == "_select_targets":
            return select_error(frame.f_locals["output"], frame.f_locals["target"])
    if not frames or frames[-1] is not [*_frames(error)][-1]:  # the model's own error
        return None
    returned = re.search(r"must be Tensor, not (\w+)", str(error))
    if returned:
        return TypeError(
            expected_found(
                "`forward_func`",
                "it to return a torch.Tensor",
                returned[1],
                "Wrap it in a function that returns the logits alone.",
            )
        )
    if not isinstance(error, AssertionError):
        return None
    if "Forward hook did not obtain" in str(error):
        return ValueError(
            expected_found(
                "`layer`",
                "a layer that runs in each forward pass",
                "one that does not",
                "Pass a layer of the model behind forward_func.",
            )
        )
    if "Target not provided" in str(error):
        return TargetError(
            expected_found(
                "`target`",
                "the output to explain, because the model has several for each example",
                "none",
                "Pass target=..., a class index or one for each example.",
            )
        )
    if "aseline" in str(error):
        return ValueError(
            expected_found(
                "`baselines`",
                f"a number, one row, or rows like the inputs' {[tuple(t.shape) for t in tensors]}",
                str(_shapes(given.get("baselines"))),
                "A distribution of reference rows is what ExpectedGradients takes.",
            )
        )
    return None


def _of_the_model(
    error: Exception, modules: Sequence[nn.Module], tensors: list[Tensor]
) -> Exception | None:
    own = [t for m in modules for t in (*m.parameters(False), *m.buffers(False))]
    message = str(error)
    devices = {t.device for t in own}
    dtypes = {t.dtype for t in own if t.is_floating_point()}
    for tensor in tensors:
        moved = any(sign in message for sign in _DEVICE_SIGNS)
        if moved and devices and tensor.device not in devices:
            remedy = "Move the batch with .to(device), or the model to the batch's device."
            if devices == {torch.device("meta")}:
                remedy = "The model has no values yet: load them, after model.to_empty(device=...)."
            there = ", ".join(sorted(map(str, devices)))
            return ValueError(
                expected_found(
                    "`inputs`",
                    f"the device of the model's parameters, {there}",
                    str(tensor.device),
                    remedy,
                )
            )
        odd = tensor.is_floating_point() and tensor.dtype not in dtypes
        if any(sign in message for sign in _DTYPE_SIGNS) and dtypes and odd:
            names = ", ".join(sorted(map(str, dtypes)))
            return TypeError(
                expected_found(
                    "`inputs`",
                    f"the dtype of the model's parameters, {names}",
                    str(tensor.dtype),
                    f"Convert the batch with .to({names}), or run it under torch.autocast.",
                )
            )
    return None


def _frames(error: BaseException) -> Iterator[Any]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _shapes(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_shapes(v) for v in value]
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
