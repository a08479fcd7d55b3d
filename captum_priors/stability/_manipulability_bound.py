"""How far an explanation can be moved at most (Dombrowski et al. 2019, 2022)."""

from typing import Any, Literal

import torch
from torch import Tensor

from captum_priors._captum import as_tuple, forward_args
from captum_priors._checks import check_count, check_floating, check_inputs, check_target
from captum_priors.engine import input_gradients
from captum_priors.engine import AttributionPass
from captum_priors._errors import NotDifferentiableError, expected_found, one_of
from captum_priors._types import TensorOrTuple
from captum_priors.stability._curvature_bound import curvature_bound
from captum_priors.stability._hessian_penalty import hessian_vector_products, rademacher
from captum_priors.stability._regularizer import Call, Tensors, flat_rows, square_norms

Norm = Literal["spectral", "frobenius"]


def manipulability_bound(
    forward_func: Any,
    inputs: TensorOrTuple,
    perturbed: TensorOrTuple,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    form: Literal["product", "path"] = "product",
    norm: Norm = "spectral",
    n_steps: int = 20,
    n_probes: int | None = None,
) -> Tensor:
    r"""Bound how far the gradient of an output moves between two inputs.

    .. math:: \lVert\nabla f(\tilde x) - \nabla f(x)\rVert_2 \le
        \lVert\tilde x - x\rVert_2 \max_z \lVert\nabla^2 f(z)\rVert

    with the Hessian norm bounded in one of two ways (Dombrowski et al. 2019, 2022). The
    *product* form holds for all :math:`z`: a chain of linear maps :math:`W_l` and Softplus
    functions has :math:`0 \le \sigma' \le 1` and :math:`0 \le \sigma'' \le \beta / 4`, so

    .. math:: \lVert\nabla^2 f\rVert_F \le \frac\beta4 \sum_{l<L} \prod_{k \le l}
        \lVert W_k\rVert^2 \prod_{k > l} \lVert W_k\rVert,

    for spectral norms, and thus for Frobenius norms, which the paper has. It is a guarantee, and
    loose. The *path* form takes the largest Hessian norm at ``n_steps`` points of the straight line
    between the inputs, the shortest curve there is: much smaller, but an estimate, as the
    maximum over a curve that is sampled.

    The bound is for gradients as they are; a normalised map moves by as much relative to its size.
    The product form is the same for all ``perturbed`` at one distance, hence a bound for the ball.

    Args:
        forward_func: The model; for the product form a module, a chain of linear,
            convolutional, average-pooling and flattening layers, BatchNorm with its stored
            statistics, and smooth activations (Softplus, Tanh, Sigmoid), or
            :class:`smooth_activations` of one with ReLU. Any model for the path form.
        inputs: :math:`x`.
        perturbed: :math:`\tilde x`, of the same shapes.
        target: The output that is explained.
        additional_forward_args: As in Captum; for the path form.
        form: ``"product"`` or ``"path"``.
        norm: ``"spectral"``, tighter, or ``"frobenius"``, the paper's.
        n_steps: Points of the path, ends included; at least 2.
        n_probes: Path form with the Frobenius norm: estimate it from so many random vectors rather
            than from one for each input feature.

    Returns:
        The bound for each example, shape ``(batch,)``, without a graph.

    Raises:
        NotDifferentiableError: If the model has no bounded Hessian, or the gradient moves by
            more than the path form allows: it has kinks, or the path too few points.
        ValueError: If an argument does not fit the others.

    Example:
        >>> import torch
        >>> from captum_priors.stability import manipulability_bound
        >>> wave = lambda x: torch.sin(2 * x).sum(1)
        >>> x = torch.zeros(1, 1)
        >>> bound = manipulability_bound(wave, x, x + 0.1, form="path")
        >>> moved = 2 - 2 * torch.cos(torch.tensor(0.2))
        >>> bool(moved < bound < 0.4)  # |f''| = 4 sin(2x) < 4
        True
    """
    one_of("form", form, ("product", "path"))
    one_of("norm", norm, ("spectral", "frobenius"))
    check_count("n_steps", n_steps, least=2)
    check_count("n_probes", n_probes, optional=True)
    check_inputs(inputs)
    start, end = as_tuple(inputs), _checked_end(inputs, perturbed)
    check_floating(start)
    check_target(target, start[0].shape[0])
    if n_probes is not None and (form, norm) != ("path", "frobenius"):
        raise ValueError(
            expected_found(
                "`n_probes`",
                "None, except with form='path' and norm='frobenius'",
                repr(n_probes),
                "Random vectors estimate the Frobenius norm of a Hessian.",
            )
        )
    start, end = (tuple(t.detach() for t in ends) for ends in (start, end))
    distance = flat_rows(tuple(b - a for a, b in zip(start, end, strict=True))).norm(dim=1)
    if form == "product":
        if len(start) > 1 or forward_args(additional_forward_args):
            raise ValueError(
                expected_found(
                    "`inputs`",
                    "one tensor, and no additional arguments, for the product form",
                    f"{len(start)} and {len(forward_args(additional_forward_args))}",
                    "Use form='path'.",
                )
            )
        with torch.no_grad():
            bound: Tensor = distance * curvature_bound(forward_func, target, norm).to(distance)
            return bound
    call = Call(forward_func, start, target, forward_args(additional_forward_args))
    with AttributionPass(forward_func), torch.enable_grad():
        return _along_path(call, end, distance, norm, n_steps, n_probes)


def _along_path(
    call: Call, end: Tensors, distance: Tensor, norm: Norm, n_steps: int, n_probes: int | None
) -> Tensor:
    largest, first, last = torch.zeros_like(distance), None, None
    for alpha in torch.linspace(0, 1, n_steps).tolist():
        points = tuple(
            torch.lerp(a, b, alpha).requires_grad_() for a, b in zip(call.inputs, end, strict=True)
        )
        gradients = input_gradients(call.output, points)
        largest = torch.maximum(largest, _hessian_norms(gradients, points, norm, n_probes))
        last = flat_rows(tuple(g.detach() for g in gradients))
        first = last if first is None else first
    assert first is not None
    assert last is not None
    bound, moved = distance * largest, (last - first).norm(dim=1)
    # Rounding of the gradients, of which two are subtracted.
    slack = 100 * torch.finfo(moved.dtype).eps * (last.norm(dim=1) + first.norm(dim=1))
    if bool((moved > bound + slack).any()):
        raise NotDifferentiableError(
            expected_found(
                "form='path'",
                "a gradient that moves by no more than the sampled Hessians allow",
                f"one that moves by {float((moved / bound).amax()):.3g} times that",
                "A network with ReLU or max-pooling has no bound: smooth it with "
                "smooth_activations. Otherwise raise n_steps or n_probes.",
            )
        )
    return bound


def _hessian_norms(gradients: Tensors, points: Tensors, norm: Norm, n_probes: int | None) -> Tensor:
    """Norm of the Hessian of each example."""
    if n_probes is not None:
        squares = torch.zeros_like(points[0].flatten(1)[:, 0])
        for _ in range(n_probes):
            estimate = hessian_vector_products(gradients, points, rademacher(points))
            squares = squares + square_norms(tuple(h.detach() for h in estimate))
        return (squares / n_probes).sqrt()
    rows = []
    for which, point in enumerate(points):
        width = point[0].numel()
        for feature in range(width):
            probes = tuple(p.new_zeros(p.shape) for p in points)
            probes[which].view(len(point), width)[:, feature] = 1
            products = hessian_vector_products(gradients, points, probes)
            rows.append(flat_rows(tuple(h.detach() for h in products)))
    hessians = torch.stack(rows, 1)
    flat = hessians.flatten(1)
    norms: Tensor = (
        torch.linalg.matrix_norm(hessians, 2) if norm == "spectral" else flat.norm(dim=1)
    )
    return norms


def _checked_end(inputs: TensorOrTuple, perturbed: Any) -> Tensors:
    check_inputs(perturbed)
    start, end = as_tuple(inputs), as_tuple(perturbed)
    shapes = [tuple(t.shape) for t in start]
    if [tuple(t.shape) for t in end] != shapes:
        raise ValueError(
            expected_found(
                "`perturbed`",
                f"shapes {shapes} as of the inputs",
                str([tuple(t.shape) for t in end]),
                "Pass what the attack made of the inputs.",
            )
        )
    return tuple(b.to(a) for a, b in zip(start, end, strict=True))
