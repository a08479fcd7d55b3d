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

from captum_priors._engine._first_order import Field, collecting_leaves, values
from captum_priors._engine._modules import submodules_of
from captum_priors._engine._replay import Conditions
from captum_priors._engine._surrogate import pull, with_pullback
from captum_priors._errors import NotDifferentiableError

# Step relative to the norm of the point. 1 % keeps the truncation error of smooth networks near
# 1e-4. Half precision rounds at 2^-8 to 2^-11 and needs a step well above that: in bfloat16 the
# error has its minimum of 1 to 4 % between 5 and 20 % (small convolutional and linear networks).
STEP = 0.01
STEP_HALF = 0.1


def finite_difference(field: Field, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input gradients whose parameter gradient is a central difference of first derivatives."""
    _refuse_modules(submodules_of(field))
    conditions = Conditions(field)
    with collecting_leaves() as found, torch.no_grad():
        gradients = values(field, points)
    if conditions.drew_random_numbers():
        raise NotDifferentiableError(
            "`forward_func`: expected a deterministic forward pass, found one that draws random "
            "numbers: the two sides of a finite difference would see different networks. Call "
            "model.eval(), use a prior (which holds the model still), or "
            "differentiation='double_backprop'."
        )
    relative_step = STEP_HALF if _half_precision(points) else STEP
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
            slope = ((above - below) * (norm / (2 * step))).sum()
            return pull([slope], [*at, *sources[n_points:]], wanted, [torch.ones_like(slope)])

    return with_pullback(gradients, [*points, *found.values()], pullback)


def _one_each(outputs: Tensor, n_rows: int) -> Tensor:
    if outputs.numel() != n_rows:
        raise NotDifferentiableError(
            f"`forward_func`: expected one output for each of the {n_rows} examples, found shape "
            f"{tuple(outputs.shape)}: a finite difference takes a step of its own for each "
            "example. Return shape (batch,), or use differentiation='double_backprop'."
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


def _half_precision(points: tuple[Tensor, ...]) -> bool:
    return any(map(_is_half, points)) or torch.is_autocast_enabled(points[0].device.type)


def _refuse_modules(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        name = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise NotDifferentiableError(
                f"finite_difference: expected examples that do not influence each other, found "
                f"{name} in train mode. Call model.eval(), use a prior (which holds the model "
                "still), or differentiation='double_backprop'."
            )
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotDifferentiableError(
                f"finite_difference: expected a backward pass without hooks, found one on {name}, "
                "which may change the gradient behind the difference's back. Remove it, or use "
                "differentiation='double_backprop'."
            )
