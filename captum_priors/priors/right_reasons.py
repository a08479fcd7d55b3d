"""Right for the right reasons, robustly: also at the worst change of what must not matter."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_priors._captum import as_tuple
from captum_priors._checks import check_floating, check_forward_func, count
from captum_priors._errors import one_of
from captum_priors._rows import carried
from captum_priors.attacks.ball import (
    Sizes,
    Tensors,
    balls,
    check_sizes,
    climb,
    draw,
    for_each,
)
from captum_priors.engine import Field, derive, input_gradients
from captum_priors.penalties import l1
from captum_priors.penalties.annotation import fitted
from captum_priors.priors.annotated import OF_EACH
from captum_priors.priors.base import Call, Term
from captum_priors.priors.classes import cross_entropies
from captum_priors.priors.terms import AnnotatedOptions

Way = Literal["double_backprop", "finite_difference"]


class RobustRightReasons(Term):
    r"""R4: no gradient of the loss where the annotation does not allow it, whatever stands there.

    .. math:: \max_{\lVert\delta\rVert_\infty \le r}\;
        \sum_i \left|(1 - M_i)\, \frac{\partial \ell}{\partial x_i}(x + \delta)\right|,
        \qquad \delta_i = 0 \text{ where } M_i \ne 0

    with the cross entropy :math:`\ell` of the class label and the mask :math:`M`, 1 where evidence
    may lie; ``inputs``, ``target=`` the labels ``(batch,)`` and ``annotation=`` as in
    :func:`captum_priors.penalties.outside` (Ghitu, Piratla, Wicker 2025; their mask is :math:`1 -
    M`). The gradient is that of the loss, as in the paper;
    :class:`RightForTheRightReasons` takes that of all log-probabilities, squared, at :math:`x`.

    The maximum is estimated by one uniform draw from the ball (``"random"``), or by projected
    ascent of the loss from there (``"pgd"``), both confined to what the annotation forbids; what
    was added is then a constant. What is published as Rand-R4 draws normal noise, and PGD-R4
    starts at :math:`x` with steps of :math:`r`. The bounds of the paper's R4 itself, by interval
    arithmetic, are not implemented.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        radius: :math:`r`, in units of the inputs; a tuple has one for each input.
        attack: ``"random"`` or ``"pgd"``.
        step_num: Steps of the ascent, each a gradient of the loss.
        step_size: Length of a step; by default ``5 * radius / step_num``.
        lower_bound: Least valid input, a number or a tensor that broadcasts; a tuple has one for
            each input.
        upper_bound: Largest valid input, likewise.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        options: ``reduction``, ``smooth``, ``batch_norm``, ``missing``, ``name`` of :class:`Term`.

    Raises:
        TypeError: If there is no annotation.
        ValueError: If an option is not one of those above, the annotation does not fit, a label is
            none of the classes, or the inputs leave the bounds.

    Example:
        >>> import torch
        >>> from captum_priors.priors import RobustRightReasons
        >>> model, x = torch.nn.Linear(3, 1, bias=False), torch.zeros(1, 3)
        >>> allowed = torch.tensor([[1, 1, 0]])
        >>> prior = RobustRightReasons(model, radius=0.5, attack="pgd")
        >>> w = model.weight[0, 2].abs()  # the worst change of the third feature is 0.5
        >>> expected = w * torch.sigmoid(0.5 * w)
        >>> torch.allclose(prior(x, target=torch.tensor([1]), annotation=allowed), expected)
        True
    """

    labels: ClassVar[bool] = True
    _needed: Mapping[str, tuple[str, str]] = {
        "annotation": ("where evidence may lie (1) and where not (0)", OF_EACH)
    }

    def __init__(
        self,
        forward_func: Any,
        *,
        radius: Sizes,
        attack: Literal["random", "pgd"] = "random",
        step_num: int = 10,
        step_size: Sizes | None = None,
        lower_bound: Any = float("-inf"),
        upper_bound: Any = float("inf"),
        differentiation: Way = "double_backprop",
        **options: Unpack[AnnotatedOptions],
    ) -> None:
        check_forward_func(forward_func)
        super().__init__(forward_func, **options)
        one_of("attack", attack, ("random", "pgd"))
        one_of("differentiation", differentiation, ("double_backprop", "finite_difference"))
        self.attack, self.differentiation = attack, differentiation
        self.replayed = differentiation == "finite_difference"
        self.radius, self.step_num = check_sizes("radius", radius), count("step_num", step_num)
        self.step_size = None if step_size is None else check_sizes("step_size", step_size)
        self.lower_bound, self.upper_bound = lower_bound, upper_bound

    def _check_call(
        self, inputs: Any, baselines: Any, target: Any, annotations: dict[str, Any]
    ) -> None:
        super()._check_call(inputs, baselines, target, annotations)
        check_floating(as_tuple(inputs))

    def _scores(self, call: Call) -> Tensor:
        allowed = self._allowed(call)
        way: Any = self.differentiation
        points = carried(call.inputs, self._worst(call, allowed))
        gradients = input_gradients(self._loss(call), points, way)
        pairs = zip(gradients, allowed, strict=True)
        return torch.stack([l1((1 - mask) * g) for g, mask in pairs]).sum(0)

    def _worst(self, call: Call, allowed: Tensors) -> Tensors:
        """Points of the ball in which only what is forbidden moves."""
        bounds = (self.lower_bound, self.upper_bound)
        region = balls(call.inputs, self.radius, "Linf", *bounds, allowed)
        generator = torch.Generator(call.inputs[0].device).manual_seed(derive(call.seed, 0))
        points = draw(region, "uniform", generator)
        if self.attack == "random":
            return points
        return climb(region, points, self._loss(call), self.step_size, self.step_num)

    def _loss(self, call: Call) -> Field:
        return partial(cross_entropies, call)

    def _allowed(self, call: Call) -> Tensors:
        """One mask for each input; what nothing is said about is allowed."""
        each = for_each("annotation", call.keywords()["annotation"], len(call.inputs))
        return tuple(
            torch.ones_like(x) if mask is None else fitted(x, mask, "mask").expand_as(x)
            for x, mask in zip(call.inputs, each, strict=True)
        )
