"""Annotations for some examples only: the others are left out, and count as zero."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._errors import refusal, type_of
from captum_priors._rows import for_each, take, take_each
from captum_priors.penalties.annotation import rows_of_nan

if TYPE_CHECKING:
    from captum_priors.priors.base import Call

C = TypeVar("C", bound="Call")
Missing = Literal["refuse", "nan"]
"""What an annotation of NaN alone says: nothing, which is refused, or that there is none."""
OF_EACH = "one entry for each example of the batch."


def annotated_rows(annotations: Mapping[str, Any], n: int, missing: Missing) -> Tensor | None:
    """Return the places of the annotated examples among ``n``, or None where all of them are.

    Those that ``annotated`` names, without those whose ``annotation`` is missing.
    """
    annotated, among = annotations.get("annotated"), annotations.get("annotation")
    nan = rows_of_nan(among) if missing == "nan" else None
    if annotated is None and nan is None:
        return None
    known = torch.ones(n, dtype=torch.bool) if annotated is None else annotated.bool()
    if nan is not None:
        known = known.to(nan.device) & ~nan
    return None if bool(known.all()) else known.nonzero().flatten()


def check_annotated(value: Any, n: int) -> None:
    """Require a truth value for each example."""
    found = type_of(value)
    if isinstance(value, Tensor):
        if value.shape == (n,) and bool(((value == 0) | (value == 1)).all()):
            return
        found = f"shape {tuple(value.shape)}" if value.shape != (n,) else "other numbers"
    raise refusal(
        TypeError if not isinstance(value, Tensor) else ValueError,
        "`annotated`",
        f"True or False for each of the {n} examples, a tensor of shape ({n},)",
        found,
        "It says which examples have an annotation: annotated=torch.tensor([True, False, ...]).",
    )


def part(call: C, rows: Tensor, *, draws_baselines: bool) -> C:
    """Return a call with some of its examples, and what belongs to them."""
    n = call.n
    rows = rows.to(call.inputs[0].device)
    given = take_each(call.given, rows, n)
    return replace(
        call,
        given=given,
        inputs=as_tuple(given),
        baselines=call.baselines if draws_baselines else take_each(call.baselines, rows, n),
        # A tuple is one index for all examples, not one entry for each.
        target=call.target if isinstance(call.target, tuple) else take(call.target, rows, n),
        args=take_each(call.args, rows, n),
        annotations={
            name: for_each(lambda t: t[rows.to(t.device)], value, n)
            for name, value in call.annotations.items()
        },
        chosen=rows,
        n_given=n,
    )


def nothing(inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the scores of no examples."""
    like = inputs[0] if inputs[0].is_floating_point() else torch.zeros((), device=inputs[0].device)
    return like.detach().new_zeros(0)


def among_all(scores: Tensor, rows: Tensor, n: int) -> Tensor:
    """Put the scores of some examples among zeros for the others."""
    if scores.dim() == 0:
        raise refusal(
            ValueError,
            "`annotated`",
            "one number for each example, so that the others count as zero",
            "one for the batch",
            "Call this prior on the annotated examples, prior(x[annotated], ...).",
        )
    return scores.new_zeros(n).index_copy(0, rows.to(scores.device), scores)
