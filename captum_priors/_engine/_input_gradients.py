"""The seam: the one place where the gradient of a model's output by its input is taken."""

import torch
from torch import Tensor

from captum_priors._engine._finite_difference import finite_difference
from captum_priors._engine._first_order import (
    Field,
    check_points,
    current_pass,
    differentiate,
    evaluate,
    values,
)
from captum_priors._engine._graph import now
from captum_priors._types import Differentiation


def input_gradients(
    field: Field, points: tuple[Tensor, ...], differentiation: Differentiation = "double_backprop"
) -> tuple[Tensor, ...]:
    r"""Gradient :math:`g = \nabla_z \sum_i f_i(z)`, with its graph where gradients are recorded.

    ``recompute`` is no case here: it wraps a whole sum of such gradients, and evaluates this
    function without a graph going forward and with one coming back.
    """
    check_points(points)
    if not torch.is_grad_enabled() or current_pass() is not None:
        return values(field, points)
    if differentiation == "finite_difference":
        return finite_difference(field, points)
    # Nobody asks for the gradient by points that are made here.
    since = None if any(p.requires_grad for p in points) else now()
    # An alias of what has a graph: the field may also use the user's own tensor, and only the
    # argument counts.
    points = tuple(p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in points)
    return differentiate(evaluate(field, points), points, create_graph=True, no_zeros_since=since)
