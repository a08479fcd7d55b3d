"""Look at a model and an explainer from outside: held still, same draws each time, no trace."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any
from zlib import crc32

import torch
from captum.attr import Attribution
from torch import Tensor

from captum_priors._captum import as_tuple, like_inputs, output_error
from captum_priors._errors import refusal, type_of
from captum_priors._rows import run_forward
from captum_priors._types import TensorOrTuple
from captum_priors.engine.random import STREAMS, seed_global

_PASSED_AT_CALL = ("inputs", "target", "additional_forward_args")


def check_explainer(explainer: Any) -> None:
    """Require an object with Captum's ``attribute``."""
    if isinstance(explainer, type) or not callable(getattr(explainer, "attribute", None)):
        raise refusal(
            TypeError,
            "`explainer`",
            "an object with Captum's attribute(inputs, ...)",
            type_of(explainer),
            "Pass for example ExpectedGradients(model).",
        )


def check_options(explainer: Any, options: Iterable[str]) -> None:
    """Refuse keywords that the explainer's ``attribute`` does not take."""
    parameters = inspect.signature(explainer.attribute).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            known = ", ".join(p for p in parameters if p not in _PASSED_AT_CALL)
            close = difflib.get_close_matches(name, parameters, n=1)
            raise refusal(
                TypeError,
                f"`{name}`",
                f"an option of {type(explainer).__name__}.attribute ({known})",
                repr(name),
                f"Did you mean {close[0]}?" if close else "Check the spelling.",
            )


def seed_or_global_state(seed: int | None) -> int:
    """Return the seed, or one read off torch's global generator without moving it."""
    return crc32(torch.get_rng_state().numpy().tobytes()) if seed is None else seed


class Probe:
    """One batch's explainer call, to be asked at any points."""

    def __init__(
        self, explainer: Any, like: TensorOrTuple, options: Mapping[str, Any], **call: Any
    ) -> None:
        self.explainer, self._like = explainer, like
        self._call = {**options, **{n: value for n, value in call.items() if value is not None}}

    def __call__(
        self, points: tuple[Tensor, ...], seed: int, *, graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Attribute at the points; one seed gives the same draws at all of them."""
        generator = self._call.get("generator")
        with ExitStack() as stack:
            if isinstance(generator, torch.Generator):
                stack.callback(generator.set_state, generator.get_state())
                generator.manual_seed(seed)
            # Explainers from elsewhere may need gradients recorded to explain at all.
            stack.enter_context(
                torch.set_grad_enabled(graph or not isinstance(self.explainer, Attribution))
            )
            seed_global(seed, STREAMS)
            found = self.explainer.attribute(like_inputs(self._like, points), **self._call)
        return tuple(a if graph else a.detach() for a in as_tuple(found))


def outputs_of(
    forward_func: Any,
    points: tuple[Tensor, ...],
    args: tuple[Any, ...] = (),
    *,
    graph: bool = False,
) -> Tensor:
    """Run the model, and require one row of outputs for each example."""
    with torch.set_grad_enabled(graph):
        outputs = run_forward(forward_func, points, None, args)
    if outputs.dim() == 0 or len(outputs) != len(points[0]):
        raise output_error(outputs, len(points[0]))
    return outputs


def predictions(outputs: Tensor) -> Tensor:
    """Return the class of each example: largest of several outputs, or the sign of one logit."""
    if outputs.dim() > 1 and outputs.shape[1] > 1:
        return outputs.argmax(1)
    return (outputs > 0).long().reshape(outputs.shape[0], -1).squeeze(1)


def default_target(outputs: Tensor) -> Tensor | None:
    """Explain the predicted class where the caller names none and there are several."""
    return predictions(outputs) if outputs.dim() == 2 and outputs.shape[1] > 1 else None
