"""The only module that touches Captum's private helpers, so that an upgrade is checked here."""

from typing import Any

from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _format_tensor_into_tuples,
    _run_forward,
    _select_targets,
)
from captum._utils.gradient import compute_gradients
from captum._utils.models.linear_model import (
    SkLearnLasso,
    SkLearnLinearRegression,
    SkLearnRidge,
)
from captum._utils.progress import progress
from captum.attr._core.dataloader_attr import SUPPORTED_METHODS
from captum.attr._core.llm_attr import GradientForwardFunc
from captum.attr._utils.common import _format_callable_baseline
from captum.attr._utils.lrp_rules import (
    Alpha1_Beta0_Rule,
    EpsilonRule,
    GammaRule,
    IdentityRule,
    PropagationRule,
)
from captum.log import log_usage
from torch import Tensor, nn

from captum_priors._rows import tile
from captum_priors._types import TensorOrTuple

__all__ = [
    "CAPTUM_RULES",
    "SUPPORTED_METHODS",
    "GradientForwardFunc",
    "PropagationRule",
    "SkLearnLasso",
    "SkLearnLinearRegression",
    "SkLearnRidge",
    "as_tuple",
    "call_baselines",
    "compute_gradients",
    "forward_args",
    "like_inputs",
    "log_usage",
    "progress",
    "run_forward",
    "run_repeated",
]

CAPTUM_RULES = (EpsilonRule, GammaRule, Alpha1_Beta0_Rule, IdentityRule)


def as_tuple(tensors: TensorOrTuple) -> tuple[Tensor, ...]:
    """Wrap one tensor into a tuple; a tuple stays as it is."""
    formatted: tuple[Tensor, ...] = _format_tensor_into_tuples(tensors)
    return formatted


def like_inputs(inputs: TensorOrTuple, tensors: tuple[Tensor, ...]) -> TensorOrTuple:
    """Unwrap a tuple of one when the user passed a bare tensor."""
    output: TensorOrTuple = _format_output(isinstance(inputs, tuple), tensors)
    return output


def forward_args(additional_forward_args: Any) -> tuple[Any, ...]:
    """Return the additional arguments as a tuple, empty where there are none."""
    return _format_additional_forward_args(additional_forward_args) or ()


def call_baselines(baselines: Any, inputs: TensorOrTuple) -> tuple[Any, ...]:
    """Call baselines given as a function of nothing or of the inputs; return a tuple."""
    formatted: tuple[Any, ...] = _format_callable_baseline(baselines, inputs)
    return formatted


def run_repeated(
    forward_func: Any,
    points: tuple[Tensor, ...],
    target: Any,
    args: tuple[Any, ...],
    n_rows: int,
) -> Tensor:
    """Run the model on rows that repeat those that the target and arguments are made for."""
    times = points[0].shape[0] // n_rows
    extra = tuple(tile(arg, times, n_rows) for arg in args)
    return run_forward(forward_func, points, tile(target, times, n_rows), extra)


def run_forward(
    forward_func: Any, inputs: tuple[Any, ...], target: Any, args: tuple[Any, ...]
) -> Tensor:
    """Run the model and select the target outputs, exactly as Captum does."""
    output: Any
    if isinstance(forward_func, nn.Module):
        # Captum looks up the signature, for functions of nothing; no module is one, and the look-up
        # takes as long as a layer of a small model.
        output = forward_func(*inputs, *args)
        if isinstance(output, Tensor):
            output = _select_targets(output, target)
    else:
        output = _run_forward(forward_func, inputs, target, args or None)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"`forward_func`: expected it to return a torch.Tensor, found {type(output).__name__}. "
            "Wrap it in a function that returns the logits alone."
        )
    return output
