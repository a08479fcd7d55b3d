r"""First-order parameter gradient of an input gradient.

For a loss :math:`P` of :math:`g = \nabla_z f(z)` with cotangent :math:`v = \partial P/\partial g`,

.. math:: \nabla_\theta \langle v, g\rangle = \nabla_\theta \, \partial_v f(z) \approx
    \nabla_\theta \, \lVert v\rVert \, \frac{f(z + h\hat v) - f(z - h\hat v)}{2h},

so the model is differentiated once by its parameters and never twice. Both sides go through it in
one batch: in half precision the cancellation must happen within the accumulators of its matrix
products, before their results are rounded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captum_priors._engine._first_order import Field, values, without_graph
from captum_priors._engine._independence import refuse_coupled_examples
from captum_priors._engine._replay import Conditions
from captum_priors._engine._surrogate import pull, with_pullback
from captum_priors._engine._wrappers import computes_in_half
from captum_priors._errors import NotDifferentiableError, expected_found

# Step relative to the norm of the point. The truncation error falls as its square and rounding
# rises as its inverse: for trained transformers and convolutional networks in float32 the minimum
# lies near 0.2 %, at 1e-4 to 1e-3 (1 %: up to 3e-2). Half precision rounds at 2^-8 to 2^-11 and
# needs much more: in bfloat16 the minimum of 1 to 4 % lies between 5 and 20 %.
STEP = 0.002
STEP_HALF = 0.1


def finite_difference(field: Field, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input gradients whose parameter gradient is a central difference of first derivatives."""
    conditions = Conditions(field)
    refuse_coupled_examples(conditions.modules, "finite_difference")
    _refuse_hooks(conditions.modules)
    with without_graph(returns_with_graph=False) as current:
        gradients = values(field, points)
    if conditions.settle():
        raise NotDifferentiableError(
            expected_found(
                "`forward_func`",
                "a deterministic forward pass",
                "one that draws random numbers: the two sides of a finite difference would see "
                "different networks",
                "Call model.eval(), use a prior (which holds the model still), or "
                "differentiation='double_backprop'.",
            )
        )
    half = half_precision(points) or computes_in_half(conditions.modules)
    relative_step, tolerance = (STEP_HALF, 0.5) if half else (STEP, 0.2)
    n_points = len(points)

    def pullback(
        cotangents: Sequence[Tensor], sources: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        with conditions.again():
            at = tuple(sources[i].detach().requires_grad_(wanted[i]) for i in range(n_points))
            moves, norm, step = _moves(cotangents, at, relative_step)
            moved = tuple(
                torch.cat([p + m.to(p.dtype), p - m.to(p.dtype)])
                for p, m in zip(at, moves, strict=True)
            )
            above, below = _one_each(field(moved), moved[0].shape[0]).chunk(2)
            slopes = (above - below) * (norm / (2 * step))
            _refuse_another_function(slopes.detach(), cotangents, gradients, tolerance)
            slope = slopes.sum()
            return pull([slope], [*at, *sources[n_points:]], wanted, [torch.ones_like(slope)])

    return with_pullback(gradients, [*points, *current.leaves.values()], pullback)


def _one_each(outputs: Tensor, n_rows: int) -> Tensor:
    if outputs.numel() != n_rows:
        raise NotDifferentiableError(
            expected_found(
                "`forward_func`",
                f"one output for each of the {n_rows} examples, because each has a step of its own",
                f"shape {tuple(outputs.shape)}",
                "Return shape (batch,), or use differentiation='double_backprop'.",
            )
        )
    outputs = outputs.reshape(n_rows)
    return outputs.float() if _is_half(outputs) else outputs


def _moves(
    cotangents: Sequence[Tensor], points: tuple[Tensor, ...], relative_step: float
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Displacements ``h v / |v|`` of each tensor, with ``|v|`` and ``h`` of each example.

    The step is the largest that moves none of the tensors by more than the given fraction of its
    own norm. A point at the origin borrows the mean norm of its batch.
    """
    vectors = [_rows(v) for v in cotangents]
    norms = torch.stack([v.norm(dim=1) for v in vectors])
    norm = norms.square().sum(0).sqrt()
    unit = torch.where(norm > 0, norm, torch.ones_like(norm))
    scales = torch.stack([_rows(p.detach()).norm(dim=1) for p in points])
    typical = scales.mean(dim=1, keepdim=True)
    typical = torch.where(typical > 0, typical, torch.ones_like(typical))
    # A point much nearer to the origin than its batch (a zero baseline) would get no step at all.
    scales = torch.maximum(scales, 0.1 * typical)
    share = norms / unit
    step = relative_step * (scales / share.clamp_min(torch.finfo(share.dtype).tiny)).amin(0)
    step = torch.where(norm > 0, step, torch.full_like(step, relative_step))
    moves = tuple(
        ((step / unit).unsqueeze(1) * v).reshape(p.shape)
        for v, p in zip(vectors, points, strict=True)
    )
    return moves, norm, step


def _rows(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(tensor.shape[0], -1)
    return rows.float() if _is_half(rows) else rows


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def half_precision(points: tuple[Tensor, ...]) -> bool:
    """Whether the model will compute in half precision, of itself or by autocast."""
    return any(map(_is_half, points)) or torch.is_autocast_enabled(points[0].device.type)


def _refuse_another_function(
    slopes: Tensor, cotangents: Sequence[Tensor], gradients: Sequence[Tensor], tolerance: float
) -> None:
    """Check the slopes of the difference against those of the backward pass.

    They disagree where the backward pass is not the derivative of the forward pass (detach,
    straight-through estimators, hooks), where examples influence each other, where the model draws
    random numbers of its own, and where the step is too long for the function. The scale is that of
    a random direction: penalties that ignore the scale of attributions are orthogonal to them.
    """
    vectors, known = (torch.cat([_rows(t) for t in each], 1) for each in (cotangents, gradients))
    expected = (vectors * known).sum(1)
    typical = vectors.norm(dim=1) * known.norm(dim=1) / vectors.shape[1] ** 0.5
    scale = expected.norm() + typical.norm()
    error = (slopes - expected).norm()
    if not error <= tolerance * scale:
        raise NotDifferentiableError(
            expected_found(
                "finite_difference",
                "differences of the outputs that agree with the input gradient",
                f"a relative error of {float(error / scale):.2g}",
                "Look for detach(), custom backward passes, tensor hooks, operations across the "
                "batch, random numbers from a generator of the model's own, or inputs far from the "
                "origin; differentiation='double_backprop' takes the backward pass as it is.",
            )
        )


def _refuse_hooks(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotDifferentiableError(
                expected_found(
                    "finite_difference",
                    "a backward pass without hooks",
                    f"one on {type(module).__name__}, which may change the gradient behind the "
                    "difference's back",
                    "Remove it, or use differentiation='double_backprop'.",
                )
            )
