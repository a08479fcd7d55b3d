"""One row of GradientExplainer or DeepExplainer, held against SHAP's own numbers.

SHAP's code runs on a private copy of the explainer and its model, so that what it leaves on modules
and in ``.grad`` is seen by nobody, and the random streams are put back.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._engine._random import GlobalRandomState, in_turn
from captum_priors._errors import NotDifferentiableError, expected_found

_BACKGROUND = 4  # rows that suffice for a wrong rule to show


def private_copy(explainer: Any) -> Any:
    """Copy SHAP's explainer with its model and the first rows of its background."""
    few = copy.copy(explainer)
    for name in ("data", "model_inputs"):
        if hasattr(few, name):
            setattr(few, name, [rows[:_BACKGROUND].detach() for rows in getattr(few, name)])
    return copy.deepcopy(few, dict(_with_graph(few.model)))


def in_precision(dtype: torch.dtype, twin: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Put a private copy into another precision; return the inputs in it."""

    def cast(rows: Tensor) -> Tensor:
        return rows.to(dtype) if rows.is_floating_point() else rows

    twin.model.to(dtype)
    for name in ("data", "model_inputs"):
        if hasattr(twin, name):
            setattr(twin, name, [cast(rows) for rows in getattr(twin, name)])
    return [cast(x) for x in inputs]


def _with_graph(model: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Tensors that modules keep from an earlier pass, which torch refuses to copy."""
    for module in model.modules():
        for held in vars(module).values():
            for each in held if isinstance(held, (tuple, list)) else (held,):
                if isinstance(each, Tensor) and not each.is_leaf:
                    yield id(each), each.detach()


def check_against_shap(
    name: str,
    explainer: Any,
    inputs: Sequence[Tensor],
    prepare: Callable[[Any, list[Tensor]], list[Tensor] | None],
    ours: Callable[[Any, list[Tensor]], tuple[list[Tensor], Tensor]],
    options: dict[str, Any],
) -> None:
    """Compare the first row.

    Where SHAP's code or a copy of the model fails there are no numbers to hold against.

    Args:
        name: SHAP's class.
        explainer: SHAP's inner explainer, which holds the module.
        inputs: Rows, of which the first is explained.
        prepare: Readies the copy and its inputs, or says with None that SHAP's numbers are not
            those to keep.
        ours: Our attributions from a copy, and its base values.
        options: What SHAP's ``shap_values`` gets.
    """
    if any(
        hasattr(module, "_orig_mod") or _runs_hooks_of_the_user(module)
        for module in explainer.model.modules()
    ):
        return  # a copy would be compiled anew, and share the hooks
    device = inputs[0].device.type
    with _streams_kept(), torch.autocast(device, enabled=False):
        try:
            twin = private_copy(explainer)
            rows = prepare(twin, [x[:1].detach().clone() for x in inputs])
            if rows is None or _is_random(twin.model, rows):
                return
        except Exception:  # whatever a user's module raises on being copied, or in double precision
            return
        with _streams_kept(), torch.no_grad():
            found, base = ours(twin, rows)
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = twin.shap_values(rows if twin.multi_input else rows[0], **options)
        except Exception:  # SHAP's own failures
            return
    _compare(name, found, base, theirs if isinstance(theirs, list) else [theirs])


def _runs_hooks_of_the_user(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(module, name).values()]
    origins = (getattr(hook, "__module__", None) or "" for hook in hooks)
    return any(origin.partition(".")[0] not in ("shap", "torch") for origin in origins)


@torch.no_grad()
def _is_random(model: nn.Module, rows: Sequence[Tensor]) -> bool:
    """Whether SHAP's numbers would be others at each call, too."""
    before = GlobalRandomState.now()
    first, second = model(*rows), model(*rows)
    same = (first == second) | (first.isnan() & second.isnan())
    return before.moved() or not bool(same.all())


def _compare(name: str, ours: list[Tensor], base: Tensor, theirs: list[Any]) -> None:
    # Rounding stays far below the root of the precision, and another rule far above.
    tolerance = min(torch.finfo(base.dtype).eps ** 0.5, 0.1)
    numbers = [a.double().cpu().numpy() for a in ours]
    stock = [np.asarray(b, dtype=float) for b in theirs]
    if [a.size for a in numbers] != [b.size for b in stock]:
        raise _other_arithmetic(name, f"shapes {[b.shape for b in stock]}")
    stock = [b.reshape(a.shape) for a, b in zip(numbers, stock, strict=True)]
    scale = max(float(np.abs(b).max(initial=0)) for b in stock)
    scale = max(scale, float(base.abs().max()))
    difference = max(
        float(np.abs(a - b).max(initial=0)) for a, b in zip(numbers, stock, strict=True)
    )
    if np.isfinite(scale) and not difference <= tolerance * scale:
        raise _other_arithmetic(
            name, f"values that differ by {difference:.3g} at a scale of {scale:.3g}"
        )


def _other_arithmetic(name: str, found: str) -> NotDifferentiableError:
    return NotDifferentiableError(
        expected_found(
            name,
            "the arithmetic of the SHAP versions that this adapter is made for",
            found,
            "Use a SHAP version that pyproject.toml names.",
        )
    )


@contextmanager
def _streams_kept() -> Iterator[None]:
    """Put back the global random streams."""
    with in_turn():
        state = GlobalRandomState.now()
        try:
            yield
        finally:
            state.restore()
