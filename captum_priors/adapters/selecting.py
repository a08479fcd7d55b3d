"""Sums of outputs for Captum's classes: the model with the sum as its output, and no target."""

import copy
from dataclasses import replace
from typing import Any

from captum.attr import Attribution
from torch import Tensor, nn

from captum_priors._captum import (
    forward_func_of,
    logits_of,
    output_error,
    run_function,
    select_error,
)
from captum_priors.outputs import SumOfOutputs


def selecting(explainer: Any, target: SumOfOutputs) -> tuple[Any, tuple[Any, ...]]:
    """Return a copy of an explainer, of the sum, and what its calls have to add to the arguments.

    Weights that have an entry for each example are an argument, because Captum repeats and selects
    arguments along with the examples.
    """
    own = target.weights if isinstance(target.weights, Tensor) else None
    return _of_sum(explainer, target), () if own is None else (own,)


def _of_sum(explainer: Any, target: SumOfOutputs) -> Any:
    twin, model = copy.copy(explainer), forward_func_of(explainer)
    kind = SumOfModule if isinstance(model, nn.Module) else SumOfFunction
    for name, value in vars(explainer).items():
        if value is model:
            vars(twin)[name] = kind(model, target)
        elif isinstance(value, Attribution):  # what a NoiseTunnel averages, the Grad-CAM of two
            vars(twin)[name] = _of_sum(value, target)
    return twin


def without_sum(forward_func: Any) -> Any:
    """Return the user's own model."""
    sums = (SumOfModule, SumOfFunction)
    return forward_func.forward_func if isinstance(forward_func, sums) else forward_func


def _sum(forward_func: Any, target: SumOfOutputs, args: tuple[Any, ...]) -> Tensor:
    if isinstance(target.weights, Tensor):
        target, args = replace(target, weights=args[-1]), args[:-1]
    outputs = logits_of(run_function(forward_func, args, None, None))
    if not isinstance(outputs, Tensor):
        raise select_error(outputs, target)
    if outputs.dim() == 0:
        raise output_error(outputs, len(args[0]))
    return target.select(outputs)


class SumOfFunction:
    """A function whose outputs are added up."""

    def __init__(self, forward_func: Any, target: SumOfOutputs) -> None:
        self.forward_func, self.target = forward_func, target

    def __call__(self, *args: Any) -> Tensor:
        """Run it, and add up."""
        return _sum(self.forward_func, self.target, args)


class SumOfModule(nn.Module):
    """A module whose outputs are added up."""

    def __init__(self, forward_func: nn.Module, target: SumOfOutputs) -> None:
        super().__init__()
        self.forward_func, self.target = forward_func, target
        self.training = forward_func.training

    def forward(self, *args: Any) -> Tensor:
        """Run it, and add up."""
        return _sum(self.forward_func, self.target, args)
