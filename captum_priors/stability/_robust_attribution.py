"""Robust attribution regularization (Chen et al. 2019)."""

from typing import Any, Literal

import torch
from torch import Tensor

from captum_priors._checks import check_count
from captum_priors.engine import input_gradients
from captum_priors._errors import one_of
from captum_priors._types import Differentiation
from captum_priors.priors.base import Reduction
from captum_priors.stability._ascent import Ascent
from captum_priors.stability._classes import cross_entropies
from captum_priors.stability._regularizer import (
    Call,
    GradientRegularizer,
    Tensors,
    check_number,
    flat_rows,
)

Objective = Literal["ig_norm", "ig_sum_norm"]


class RobustAttribution(GradientRegularizer):
    r"""IG-NORM and IG-SUM-NORM: penalise what the loss's worst change is attributed to.

    .. math:: \max_{x' \in B(x, r)} \lVert\mathrm{IG}_\ell(x, x')\rVert_1
        \qquad\text{or}\qquad
        \max_{x' \in B(x, r)} \ell(x') + \beta \lVert\mathrm{IG}_\ell(x, x')\rVert_1

    with integrated gradients of the cross entropy :math:`\ell` along the line from :math:`x` to
    :math:`x'`, which sum to :math:`\ell(x') - \ell(x)`, and the ball of the maximum norm (Chen et
    al. 2019). The first is added to the cross entropy, with weight 1 in the paper; the second takes
    its place. The target is the class labels.

    The maximum is sought by signed gradient ascent from a random point, and is then a constant.
    Defaults are the paper's for MNIST. Each of ``n_iter`` steps differentiates ``attack_steps``
    input gradients.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        objective: ``"ig_norm"`` or ``"ig_sum_norm"``.
        radius: :math:`r`, in units of the inputs.
        step_size: Length of a step of the ascent.
        n_iter: Steps of the ascent.
        n_steps: Midpoints of the integral that is trained on.
        attack_steps: Midpoints of the integral during the ascent.
        weight: :math:`\beta` of IG-SUM-NORM.
        bounds: Least and largest valid input, such as ``(0, 1)``, or None.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run the model with ReLU as Softplus of this steepness.

    Raises:
        ValueError: If an option is not one of those above.

    Example:
        >>> import torch
        >>> from captum_priors.stability import RobustAttribution
        >>> flat = lambda x: torch.zeros(len(x), 2) * x  # a loss that does not move
        >>> RobustAttribution(flat, n_iter=2)(torch.randn(3, 2), target=0).item()
        0.0
    """

    def __init__(
        self,
        forward_func: Any,
        objective: Objective = "ig_norm",
        *,
        radius: float = 0.3,
        step_size: float = 0.01,
        n_iter: int = 40,
        n_steps: int = 50,
        attack_steps: int = 10,
        weight: float = 0.1,
        bounds: tuple[float, float] | None = None,
        differentiation: Differentiation = "double_backprop",
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(
            forward_func, differentiation=differentiation, reduction=reduction, smooth=smooth
        )
        one_of("objective", objective, ("ig_norm", "ig_sum_norm"))
        self.objective: Objective = objective
        self.ascent = Ascent(radius, step_size, n_iter, bounds)
        check_count("n_steps", n_steps)
        check_count("attack_steps", attack_steps)
        self.n_steps, self.attack_steps = n_steps, attack_steps
        self.weight = check_number("weight", weight)

    labels = True

    def _scores(self, call: Call) -> Tensor:
        worst = self.ascent.climb(
            call.inputs,
            self.ascent.start(call.inputs),
            lambda points: self._objective(call, points, self.attack_steps),
        )
        return self._objective(call, worst, self.n_steps)

    def _holds_again(self) -> bool:
        # The cross entropy of IG-SUM-NORM comes from an ordinary forward pass.
        return super()._holds_again() and self.objective == "ig_norm"

    def _objective(self, call: Call, points: Tensors, n_steps: int) -> Tensor:
        size = flat_rows(self._integrated(call, points, n_steps)).abs().sum(1)
        if self.objective == "ig_norm":
            return size
        return cross_entropies(call, points) + self.weight * size

    def _integrated(self, call: Call, ends: Tensors, n_steps: int) -> Tensors:
        """Integrated gradients of the loss from the inputs to the ends."""
        like = call.inputs[0]
        alphas = (torch.arange(n_steps, dtype=like.dtype, device=like.device) + 0.5) / n_steps
        path = tuple(
            torch.cat([torch.lerp(x, end, alpha.to(x.dtype)) for alpha in alphas])
            for x, end in zip(call.inputs, ends, strict=True)
        )
        way = self.differentiation
        gradients = input_gradients(lambda p: cross_entropies(call, p), path, way)
        return tuple(
            (end - x) * g.reshape(n_steps, *x.shape).mean(0)
            for x, end, g in zip(call.inputs, ends, gradients, strict=True)
        )

    def _options(self) -> dict[str, Any]:
        return {"objective": self.objective, "radius": self.ascent.radius}
