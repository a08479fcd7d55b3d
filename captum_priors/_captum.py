"""The only module that touches Captum's private names (Captum 0.8 and 0.9): an upgrade starts here.

Inputs, arguments and targets mean what they mean to Captum, because its own helpers take them. The
other names tell what is Captum's own from what is a user's: its gradient function, linear models,
rules, the layers that these cover and the methods that it loads batches for. Its progress bar is
that of its own attacks.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
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
from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR
from captum.attr._core.llm_attr import GradientForwardFunc
from captum.attr._core.lrp import SUPPORTED_LAYERS_WITH_RULES, SUPPORTED_NON_LINEAR_LAYERS
from captum.attr._utils.lrp_rules import (
    Alpha1_Beta0_Rule,
    EpsilonRule,
    GammaRule,
    IdentityRule,
    PropagationRule,
)
from torch import Tensor, nn

from captum_priors._errors import TargetError, refusal
from captum_priors._types import TensorOrTuple

__all__ = [
    "CAPTUM_RULES",
    "RESCALED",
    "SUPPORTED_METHODS",
    "WITH_RULES",
    "GradientForwardFunc",
    "PropagationRule",
    "SkLearnLasso",
    "SkLearnLinearRegression",
    "SkLearnRidge",
    "as_tuple",
    "call_baselines",
    "called_with_batches",
    "called_with_texts",
    "compute_gradients",
    "forward_args",
    "like_inputs",
    "logits_of",
    "logits_returned",
    "output_error",
    "progress",
    "run_function",
    "select_error",
    "select_targets",
    "tensor_error",
]

CAPTUM_RULES = (EpsilonRule, GammaRule, Alpha1_Beta0_Rule, IdentityRule)
# The modules that DeepLIFT has a rule for, by their exact types.
RESCALED = tuple(SUPPORTED_NON_LINEAR)
# Likewise those of LRP.
WITH_RULES = (*SUPPORTED_LAYERS_WITH_RULES, *SUPPORTED_NON_LINEAR_LAYERS)


as_tuple: Callable[[Any], tuple[Tensor, ...]] = _format_tensor_into_tuples
"""Wrap one tensor into a tuple; a tuple stays as it is."""
run_function: Callable[..., Any] = _run_forward
"""Call a function of the inputs and additional arguments, or of nothing."""
select_targets: Callable[[Tensor, Any], Tensor] = _select_targets
"""Select the target outputs, shape ``(rows,)``."""


called_with_batches: Callable[[Any], Any] = attrgetter("_forward_with_dataloader")
"""Return what a DataLoaderAttribution has its method explain."""
called_with_texts: Callable[[Any], Any] = attrgetter("_forward_func")
"""Likewise of a LLMAttribution."""


def like_inputs(inputs: TensorOrTuple, tensors: tuple[Tensor, ...]) -> TensorOrTuple:
    """Unwrap a tuple of one when the user passed a bare tensor."""
    output: TensorOrTuple = _format_output(isinstance(inputs, tuple), tensors)
    return output


def forward_args(additional_forward_args: Any) -> tuple[Any, ...]:
    """Return the additional arguments as a tuple, empty where there are none."""
    return _format_additional_forward_args(additional_forward_args) or ()


def call_baselines(baselines: Any, inputs: TensorOrTuple) -> Any:
    """Call baselines that are a function, of nothing or of the inputs."""
    return baselines(inputs) if inspect.signature(baselines).parameters else baselines()


def logits_of(output: Any) -> Any:
    """Return the logits of an output that has some, as those of transformers' classifiers do."""
    found = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output


@contextmanager
def logits_returned(model: Any) -> Iterator[None]:
    """Let a module return its logits, to Captum, which knows tensors alone."""
    hook = None
    if isinstance(model, nn.Module):
        hook = model.register_forward_hook(_logits_hook)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _logits_hook(module: nn.Module, args: Any, output: Any) -> Any:
    return logits_of(output)


def output_error(output: Tensor, n_rows: int) -> Exception:
    """Word that outputs are not one row for each row of inputs."""
    return refusal(
        ValueError,
        "`forward_func`",
        f"outputs for each of the {n_rows} rows, shape (rows, ...)",
        f"shape {tuple(output.shape)}",
        'Return the outputs of each example, unreduced: a loss takes reduction="none".',
    )


def tensor_error(returned: str) -> Exception:
    """Word that a model returns something of another type."""
    return refusal(
        TypeError,
        "`forward_func`",
        "it to return a torch.Tensor, or to be a module whose output has logits",
        returned,
        "Wrap it in a function that returns the logits alone; for a model of transformers, "
        "captum_priors.integrations.huggingface.LogitsOf(model).",
    )


def select_error(output: Any, target: Any) -> Exception:
    """Word why no output can be selected."""
    if not isinstance(output, Tensor):
        return tensor_error(type(output).__name__)
    found = repr(target)
    if isinstance(target, Tensor):
        found = f"{target.dtype} of shape {tuple(target.shape)} on {target.device}"
        if target.numel() and not target.is_meta and not target.is_floating_point():
            found += f", values from {target.min().item()} to {target.max().item()}"
    return refusal(
        TargetError,
        "`target`",
        f"what selects one output for each row of outputs {tuple(output.shape)} on {output.device}",
        found if len(found) < 200 else f"a {type(target).__name__}",
        "Pass a class index from 0 to outputs - 1, or an int64 tensor (batch,) of them on the "
        "model's device; of outputs of several dimensions a tuple, target=(class, row, column); "
        "leave it out where there is one output for each example; for sums of outputs, or all of "
        "them, see captum_priors.outputs.",
    )


def forward_func_of(explainer: Any) -> Any:
    """Find the model that an explainer explains, or None."""
    for name in ("forward_func", "model"):
        found = getattr(explainer, name, None)
        if callable(found):
            return found
    inner = getattr(explainer, "attribution_method", None)  # what a NoiseTunnel averages
    return None if inner is None else forward_func_of(inner)
