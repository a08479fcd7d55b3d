"""Whose statistics BatchNorm layers in training mode are explained on: the outermost batch's."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._rows import Rows
from captum_priors.engine import AttributionPass
from captum_priors.engine._torch import out_of_inference
from captum_priors.engine.finite_difference import full_precision

if TYPE_CHECKING:
    from captum_priors.priors.base import Term

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


def compares(term: "Term") -> bool:
    """Whether a term on running statistics looks at both now: at calls 1, 2, 4, 8, ... until told.

    ``term.calls`` counts them.
    """
    if term.calls >= 0:
        term.calls += 1
    return term.calls > 0 and term.calls & (term.calls - 1) == 0


def hold_statistics(term: "Term", explaining: AttributionPass, batch: Batch) -> None:
    """Hold the statistics that a term's models have on the batch, or on the one it is a part of."""
    models, whole = term.models(), out_of_inference(_whole.get() or batch)
    if term.batch_norm == "running":
        _compare(term, explaining, models, whole)
        return
    device = as_tuple(whole[0])[0].device.type

    def run() -> list[Tensor]:
        with nullcontext() if explaining.exact else full_precision(device):  # as differences are
            return _outputs(models, whole)

    model = models[0] if len(models) == 1 else None
    explaining.hold_statistics(run, model, as_tuple(whole[0]))


def _compare(
    term: "Term", explaining: AttributionPass, models: Sequence[Any], batch: Batch
) -> None:
    """Go on with running statistics, and say so if the outputs on them are others."""
    with torch.no_grad():
        trained = explaining.hold_statistics(lambda: _outputs(models, batch)) or []
        if explaining.statistics is not None:
            explaining.statistics.release()
        pairs = zip(trained, _outputs(models, batch), strict=True)
        if any(bool((a - b).abs().mean() > a.std(correction=0)) for a, b in pairs):
            warnings.warn(_DIFFER, stacklevel=2)
            term.calls = -1


def _outputs(models: Sequence[Any], batch: Batch) -> list[Tensor]:
    inputs, args = batch
    tensors = as_tuple(inputs)
    return [Rows(model, None, args, tensors[0].shape[0])(tensors) for model in models]
