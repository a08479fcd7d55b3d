"""Attributional robustness training (Singh et al. 2020)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._captum import like_inputs
from captum_priors._checks import check_count
from captum_priors.engine import input_gradients
from captum_priors._lift import cosine_distance
from captum_priors._types import Differentiation, TensorOrTuple
from captum_priors.priors.base import Reduction
from captum_priors.stability._ascent import Ascent
from captum_priors.stability._classes import labels_of, logits_of
from captum_priors.stability._regularizer import (
    Call,
    GradientRegularizer,
    Tensors,
    flat_rows,
)


class AttributionAlignment(GradientRegularizer):
    r"""ART: the gradient of the true class is like the image, that of the runner-up is not.

    .. math:: \log\left(1 + e^{\,d(g_y, x) - d(g_k, x)}\right), \qquad d(g, x) = 1 - \cos(g, x),

    with input gradients of the logits of the true class y and of the highest other class k (Singh
    et al. 2020). It is the mean over :math:`x` and a perturbed :math:`\tilde x`, each compared with
    the farther one of the two gradients :math:`g_y` and the nearer one of the two :math:`g_k`, at
    :math:`x` and at :math:`\tilde x`. The perturbation raises the same loss, on the entries where
    :math:`|g_y|` is largest, by signed ascent from a random point of the ball. The target is the
    class labels. The paper adds it with weight ½ to the cross entropy *at the perturbed inputs*:
    :meth:`perturb` gives such inputs.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        radius: Maximum norm of the perturbation, in units of the inputs.
        step_size: Length of a step of the ascent.
        n_iter: Steps of the ascent.
        top_k: Entries that the ascent's loss looks at, all where there are fewer.
        bounds: Least and largest valid input, such as ``(0, 1)``, or None.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Softplus in place of ReLU with this steepness, 50 in the paper; None for ReLU,
            whose gradients the ascent cannot move.

    Raises:
        ValueError: If an option is not one of those above.

    Example:
        >>> import torch
        >>> from captum_priors.stability import AttributionAlignment
        >>> model = torch.nn.Linear(3, 2)
        >>> aligned = model.weight[:1].detach()  # an input like its own class's gradient
        >>> art = AttributionAlignment(model, radius=1e-6, step_size=1e-6)
        >>> (art(aligned, target=0) < art(-aligned, target=0)).item()
        True
    """

    def __init__(
        self,
        forward_func: Any,
        *,
        radius: float = 8 / 255,
        step_size: float = 5 / 255,
        n_iter: int = 3,
        top_k: int = 1000,
        bounds: tuple[float, float] | None = None,
        differentiation: Differentiation = "double_backprop",
        reduction: Reduction = "mean",
        smooth: float | None = 50.0,
    ) -> None:
        super().__init__(
            forward_func, differentiation=differentiation, reduction=reduction, smooth=smooth
        )
        self.ascent = Ascent(radius, step_size, n_iter, bounds)
        check_count("top_k", top_k)
        self.top_k = top_k

    labels = True

    def _scores(self, call: Call) -> Tensor:
        worst = self._climb(call)
        both = tuple(torch.cat([x, w]) for x, w in zip(call.inputs, worst, strict=True))
        anchors = flat_rows(both).reshape(2, call.n, -1)
        positive, negative = (
            flat_rows(g).reshape(2, call.n, -1) for g in self._gradients(call, both)
        )
        terms = []
        for anchor in anchors:
            farther = torch.stack([cosine_distance(g, anchor) for g in positive]).amax(0)
            nearer = torch.stack([cosine_distance(g, anchor) for g in negative]).amin(0)
            terms.append(F.softplus(farther - nearer))
        return torch.stack(terms).mean(0)

    def perturb(
        self, inputs: TensorOrTuple, target: Any, additional_forward_args: Any = None
    ) -> TensorOrTuple:
        """Return the perturbed inputs that the next call on this batch will compare."""
        with self.evaluating(inputs, None, target, additional_forward_args, advance=False) as call:
            worst = self._climb(call)
        return like_inputs(inputs, worst)

    def _climb(self, call: Call) -> Tensors:
        start = self.ascent.start(call.inputs)
        with torch.no_grad():
            saliency = flat_rows(self._gradients(call, start)[0]).abs()
        top = saliency.topk(min(self.top_k, saliency.shape[1]), dim=1).indices

        def loss(points: Tensors) -> Tensor:
            positive, negative = (
                flat_rows(g).gather(1, top) for g in self._gradients(call, points)
            )
            x = flat_rows(points).gather(1, top)
            return F.softplus(cosine_distance(positive, x) - cosine_distance(negative, x))

        return self.ascent.climb(call.inputs, start, loss)

    def _gradients(self, call: Call, points: Tensors) -> tuple[Tensors, Tensors]:
        """Input gradients of the true class and of the runner-up."""
        way = self.differentiation

        def true(points: Tensors) -> Tensor:
            logits, mask = _logits_and_mask(call, points)
            return torch.where(mask, logits, 0).sum(1)

        def runner_up(points: Tensors) -> Tensor:
            logits, mask = _logits_and_mask(call, points)
            return logits.masked_fill(mask, -torch.inf).amax(1)

        return input_gradients(true, points, way), input_gradients(runner_up, points, way)

    def _options(self) -> dict[str, Any]:
        return {"radius": self.ascent.radius}


def _logits_and_mask(call: Call, points: Tensors) -> tuple[Tensor, Tensor]:
    """Logits, and where the true class is."""
    logits = logits_of(call.outputs(points))
    labels = labels_of(call).repeat(len(logits) // call.n)
    classes = torch.arange(logits.shape[1], device=logits.device)
    return logits, classes == labels.unsqueeze(1)
