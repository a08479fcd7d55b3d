"""Say what was passed wrongly where a model, or Captum's own code, fails on it.

Looked into only after a failure, so that nothing is refused that works (a model on several devices,
a model that moves its inputs), nothing is run twice, and a call that succeeds costs nothing.
"""

import re
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._captum import select_error, select_targets, tensor_error
from captum_priors._checks import check_inputs
from captum_priors._errors import TargetError, refusal, type_of

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
    trace = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [f for f in trace if str(f.f_globals.get("__name__")).startswith("captum.")]
    for frame in reversed(frames):
        if frame.f_code is select_targets.__code__:
            return select_error(frame.f_locals["output"], frame.f_locals["target"])
    if not frames or frames[-1] is not trace[-1]:  # the model's own error
        return None
    message = str(error)
    returned = re.search(r"must be Tensor, not (\w+)", message)
    if returned:
        return tensor_error(returned[1])
    baselines = given.get("baselines")
    each = baselines if isinstance(baselines, tuple) else (baselines,)
    asserted = {
        "Forward hook did not obtain": (
            ValueError,
            "`layer`",
            "a layer that runs in each forward pass",
            "one that does not",
            "Pass a layer of the model behind forward_func.",
        ),
        "Target not provided": (
            TargetError,
            "`target`",
            "the output to explain, because the model has several for each example",
            "none",
            "Pass target=..., a class index or one for each example.",
        ),
        "aseline": (
            ValueError,
            "`baselines`",
            f"a number, one row, or rows like the inputs' {_shapes(tensors)}",
            _shapes(each),
            "A distribution of reference rows is what ExpectedGradients takes.",
        ),
    }
    for sign, worded in asserted.items():
        if sign in message and isinstance(error, AssertionError):
            return refusal(*worded)
    return None


def _shapes(values: Sequence[Any]) -> list[Any]:
    return [tuple(v.shape) if isinstance(v, Tensor) else type_of(v) for v in values]


def _of_the_model(
    error: Exception, modules: Sequence[nn.Module], tensors: list[Tensor]
) -> Exception | None:
    own = [t for m in modules for t in (*m.parameters(False), *m.buffers(False))]
    devices = sorted({str(t.device) for t in own})
    dtypes = sorted({str(t.dtype) for t in own if t.is_floating_point()})
    message = str(error)
    moved = devices and any(sign in message for sign in _DEVICE_SIGNS)
    converted = dtypes and any(sign in message for sign in _DTYPE_SIGNS)
    for tensor in tensors:
        if moved and str(tensor.device) not in devices:
            return refusal(
                ValueError,
                "`inputs`",
                f"the device of the model's parameters, {', '.join(devices)}",
                tensor.device,
                "The model has no values yet: load them, after model.to_empty(device=...)."
                if devices == ["meta"]
                else "Move the batch with .to(device), or the model to the batch's device.",
            )
        if converted and tensor.is_floating_point() and str(tensor.dtype) not in dtypes:
            names = ", ".join(dtypes)
            return refusal(
                TypeError,
                "`inputs`",
                f"the dtype of the model's parameters, {names}",
                tensor.dtype,
                f"Convert the batch with .to({names}), or run it under torch.autocast.",
            )
    return None
