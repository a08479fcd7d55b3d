"""The Hessian penalty (Dombrowski et al. 2022), and products with Hessians."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_priors._checks import count, positive
from captum_priors._errors import one_of
from captum_priors.attacks.ball import Tensors, per_example
from captum_priors.engine import with_second_derivative
from captum_priors.engine.finite_difference import computes_in_half
from captum_priors.priors.base import Call
from captum_priors.priors.terms import TermOptions
from captum_priors.stability.base import Regularizer, flat_rows, square_norms

# The truncation error falls as the square of the step, rounding rises as its inverse.
_STEP, _STEP_HALF = 0.01, 0.1

Curvature = Literal["exact", "difference", "difference_twice"]
Product = Callable[[Tensors], Tensors]


class HessianPenalty(Regularizer):
    r"""Penalise the curvature of the explained output, which bounds how far its gradient can move.

    .. math:: \lVert\nabla_x^2 f(x)\rVert_F^2 = \mathbb E_v \lVert\nabla_x^2 f(x)\, v\rVert_2^2,
        \qquad v_i = \pm 1

    (Dombrowski et al. 2022; Hutchinson's estimator), for the output that ``target`` selects, the
    logit of the true class, say. The value is the mean over ``n_samples`` random vectors, an
    unbiased estimate; Rademacher entries have the least variance.

    With ``curvature="exact"`` the product with the Hessian is a second backward pass, so training
    differentiates the model three times. With ``"difference"`` it is
    :math:`(\nabla f(x + hv) - \nabla f(x - hv)) / 2h`, one order less, and with
    ``"difference_twice"`` the parameter gradient of *that* is a finite difference, too: first
    derivatives alone. Torch's third derivatives of LayerNorm and InstanceNorm are wrong: the exact
    product refuses models that have them.

    A piecewise linear network (ReLU, max-pooling) has a Hessian of zero wherever it has one: the
    exact product then has nothing to train on, and warns. Give ``smooth``, or train
    a model with smooth activations.

    Args:
        forward_func: The model, or a function.
        n_samples: Random vectors for each call.
        curvature: ``"exact"``, ``"difference"`` or ``"difference_twice"``.
        step_size: :math:`h` relative to the root mean square of an example's entries; by default
            .01, and .1 in half precision.
        options: ``reduction``, ``smooth``, ``batch_norm``, ``name`` of :class:`Term`.

    Raises:
        NotDifferentiableError: If an operator of the model lacks the derivatives that are needed.

    Example:
        >>> import torch
        >>> from captum_priors.stability import HessianPenalty
        >>> diagonal = torch.tensor([1.0, -2.0, 3.0])
        >>> quadratic = lambda x: (x.square() * diagonal).sum(1) / 2
        >>> HessianPenalty(quadratic)(torch.randn(4, 3)).item()
        14.0
    """

    def __init__(
        self,
        forward_func: Any,
        n_samples: int = 1,
        *,
        curvature: Curvature = "exact",
        step_size: float | None = None,
        **options: Unpack[TermOptions],
    ) -> None:
        super().__init__(forward_func, **options)
        one_of("curvature", curvature, ("exact", "difference", "difference_twice"))
        self.curvature, self.n_samples = curvature, count("n_samples", n_samples)
        self.step_size = None if step_size is None else positive("step_size", step_size)
        self.replayed = curvature == "difference_twice"
        self._warned = False

    def _way(self) -> str:
        return "finite_difference" if self.curvature == "difference_twice" else "double_backprop"

    def _scores(self, call: Call) -> Tensor:
        product = self._exact(call) if self.curvature == "exact" else self._difference(call)
        probes = (rademacher(call.inputs) for _ in range(self.n_samples))
        scores = torch.stack([square_norms(product(v)) for v in probes]).mean(0)
        if not self._warned:
            self._warned = True  # once, because looking at a value makes a GPU wait
            if not bool(scores.detach().any()):
                warnings.warn(
                    f"{self!r}: the Hessian is zero at every example, as that of a piecewise "
                    "linear network is. Pass smooth=beta (30, say), or train with smooth "
                    "activations.",
                    stacklevel=2,
                )
        return scores

    def _exact(self, call: Call) -> Product:
        points = tuple(
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in call.inputs
        )
        return partial(hessian_vector_product, self._input_gradients(call, points), points)

    def _difference(self, call: Call) -> Product:
        half = computes_in_half(call.inputs)
        size = _typical_size(call.inputs) * (self.step_size or (_STEP_HALF if half else _STEP))

        def product(probes: Tensors) -> Tensors:
            moves = [per_example(size, v).to(v) * v for v in probes]
            sides = zip(call.inputs, moves, strict=True)
            points = tuple(torch.cat([x + m, x - m]) for x, m in sides)
            above, below = flat_rows(self._input_gradients(call, points)).chunk(2)
            return ((above - below) / (2 * size.unsqueeze(1)),)

        return product


def rademacher(like: Tensors) -> Tensors:
    """Random signs."""
    return tuple(torch.randint_like(x, 2, requires_grad=False) * 2 - 1 for x in like)


def hessian_vector_product(
    gradients: Tensors, points: Tensors, vectors: Tensors, *, create_graph: bool = True
) -> Tensors:
    """Differentiate <gradients, vectors>; zero where nothing depends on a point."""
    slope = (flat_rows(gradients) * flat_rows(vectors)).sum()
    if not slope.requires_grad:
        return tuple(map(torch.zeros_like, points))
    options: Any = {"allow_unused": True, "materialize_grads": True}
    if create_graph:
        return with_second_derivative(slope, points, **options)
    return torch.autograd.grad(slope, points, retain_graph=True, **options)


def _typical_size(inputs: Tensors) -> Tensor:
    """Root mean square of each example's entries, the least over its tensors.

    No less than a tenth of the batch's: an example at the origin would get no step at all.
    """
    sizes = torch.stack([flat_rows((x.detach(),)).square().mean(1).sqrt() for x in inputs])
    sizes = torch.maximum(sizes, 0.1 * sizes.mean(1, keepdim=True))
    return torch.where(sizes > 0, sizes, 1).amin(0)
