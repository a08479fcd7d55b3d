"""Say what was passed wrongly where a model, or Captum's own code, fails on it.

Looked into only after a failure, so that nothing is refused that works (a model on several devices,
a model that moves its inputs), nothing is run twice, and a call that succeeds costs nothing.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from captum_priors._captum import output_error, select_error
from captum_priors._checks import check_inputs
from captum_priors._engine._modules import modules_of
from captum_priors._errors import TargetError, expected_found

P = ParamSpec("P")
T = TypeVar("T")
_FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError)


# How torch says that devices or dtypes do not go together.
_DEVICE_SIGNS = ("same device", "on device", "device type", "meta tensor")
_DTYPE_SIGNS = ("dtype", "same type", "scalar type", "should be the same", "expected m1 and m2")


def names_mismatch(function: Callable[P, T]) -> Callable[P, T]:
    """Word the failures of a function ``(holder of the model, inputs, ...)`` as what causes them.

    An error whose cause is not recognised, such as any that the model raises on purpose, passes.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except _FAILURES as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or ", found " in str(error):
                raise
            given = {"inputs": args[1] if len(args) > 1 else kwargs.get("inputs"), **kwargs}
            cause = _cause(error, args[0] if args else None, given)
            if cause is None:
                raise
            raise cause from error

    return wrapper


def _cause(error: Exception, holder: Any, given: dict[str, Any]) -> Exception | None:
    inputs = given["inputs"]
    each = inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = [t for t in each if isinstance(t, Tensor)]
    if any(0 in (t.dim(), *t.shape[:1]) for t in tensors):
        try:
            check_inputs(inputs)
        except ValueError as found:
            return found
    frames = list(_frames(error))
    for frame in reversed([f for f in frames if _is_captum(f)]):
        known = frame.f_locals
        if frame.f_code.co_name == "_select_targets":
            return select_error(known["output"], known["target"])
        if isinstance(known.get("model_out"), Tensor):  # DeepLIFT's, of inputs and baselines
            return output_error(known["model_out"].flatten(0, 1), 2 * tensors[0].shape[0])
        if "must be Tensor, not" in str(error) and isinstance(known.get("outputs"), (dict, tuple)):
            return select_error(known["outputs"], None)
    asserted = isinstance(error, AssertionError) and _is_captum(frames[-1])
    if asserted and "Target not provided" in str(error):
        return TargetError(
            expected_found(
                "`target`",
                "the output to explain, because the model has several for each example",
                "none",
                "Pass target=..., a class index or one for each example.",
            )
        )
    if asserted and "aseline" in str(error):
        return ValueError(
            expected_found(
                "`baselines`",
                f"a number, one row, or rows like the inputs' {[tuple(t.shape) for t in tensors]}",
                str(_shapes(given.get("baselines"))),
                "A distribution of reference rows is what ExpectedGradients takes.",
            )
        )
    return _of_the_model(error, holder, tensors)


def _of_the_model(error: Exception, holder: Any, tensors: list[Tensor]) -> Exception | None:
    # A prior keeps what it explains out of its own parameters, and has buffers of its own.
    inner = [getattr(holder, name, None) for name in ("explainer", "forward_func")]
    holders = [thing for thing in inner if thing is not None] or [holder]
    own = [t for module in modules_of(*holders) for t in (*module.parameters(), *module.buffers())]
    message = str(error)
    devices = {t.device for t in own}
    moved = any(sign in message for sign in _DEVICE_SIGNS)
    for tensor in tensors:
        if moved and devices and tensor.device not in devices:
            there = ", ".join(sorted(map(str, devices)))
            remedy = "Move the batch with .to(device), or the model to the batch's device."
            if devices == {torch.device("meta")}:
                remedy = "The model has no values yet: load them, after model.to_empty(device=...)."
            return ValueError(
                expected_found(
                    "`inputs`",
                    f"the device of the model's parameters, {there}",
                    str(tensor.device),
                    remedy,
                )
            )
    dtypes = {t.dtype for t in own if t.is_floating_point()}
    for tensor in tensors:
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


def _frames(error: Exception) -> Iterator[Any]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _is_captum(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("captum.")


def _shapes(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_shapes(v) for v in value]
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
