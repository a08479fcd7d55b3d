"""Whose statistics BatchNorm layers in training mode are explained on: the outermost batch's."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._rows import Rows
from captum_priors.engine import AttributionPass
from captum_priors.engine.model import out_of_inference

Batch = tuple[Any, tuple[Any, ...]]  # inputs, and additional arguments
_whole: ContextVar[Batch | None] = ContextVar("whole batch", default=None)

_DIFFER = (
    "batch_norm='running': the outputs of the model on the explained batch differ between running "
    "statistics and those of the batch by more than they differ between examples. The prior then "
    "explains another function than the one that is trained, and can ruin the model in evaluation "
    "mode. Use batch_norm='batch'."
)


@contextmanager
def part_of(inputs: Any, additional_forward_args: Any) -> Iterator[None]:
    """Evaluate priors on a part of this batch, whose statistics their models keep."""
    args = additional_forward_args
    args = () if args is None else args if isinstance(args, tuple) else (args,)
    token = _whole.set(_whole.get() or (inputs, args))
    try:
        yield
    finally:
        _whole.reset(token)


def hold_statistics(explaining: AttributionPass, models: Sequence[Any], batch: Batch) -> list[Any]:
    """Hold the statistics that the models have on the batch, or on the one that it is a part of."""
    return explaining.hold_statistics(lambda: _outputs(models, batch))


def warn_of_running_statistics(
    explaining: AttributionPass, models: Sequence[Any], batch: Batch
) -> bool:
    """Go on with running statistics, and say so if the outputs on them are others: whether."""
    with torch.no_grad():
        trained = hold_statistics(explaining, models, batch)
        if explaining.statistics is not None:
            explaining.statistics.release()
        pairs = zip(trained, _outputs(models, batch), strict=True)
        differ = any(bool((a - b).abs().mean() > a.std(correction=0)) for a, b in pairs)
    if differ:
        warnings.warn(_DIFFER, stacklevel=2)
    return differ


def _outputs(models: Sequence[Any], batch: Batch) -> list[Tensor]:
    inputs, args = out_of_inference(_whole.get() or batch)
    tensors = as_tuple(inputs)
    n = tensors[0].shape[0]
    return [Rows(model, None, args, n)(tensors) for model in models]
