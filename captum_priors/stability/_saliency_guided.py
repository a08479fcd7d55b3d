"""Saliency-guided training (Ismail et al. 2021)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors.engine import input_gradients
from captum_priors._errors import expected_found
from captum_priors.priors.base import Reduction
from captum_priors.stability._classes import logits_of
from captum_priors.stability._regularizer import Call, Regularizer, Tensors, flat_rows


class SaliencyGuided(Regularizer):
    r"""SGT: predictions that stay when the features of least saliency are replaced by noise.

    .. math:: \mathrm{KL}\left(\mathrm{softmax} f(x) \,\Vert\, \mathrm{softmax} f(\tilde x)\right)

    (Ismail et al. 2021), where :math:`\tilde x` has the features whose gradient of the target
    output is smallest replaced by numbers uniform between the smallest and largest entry of the
    example. Both predictions are trained; only first derivatives are taken. The paper adds it to
    the cross entropy with weight 1.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        fraction: Share of the features that is replaced, .5 in the paper.
        absolute: Rank by absolute gradients; the public code ranks signed ones unless told
            otherwise, and so replaces the features that speak most against the class.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run the model with ReLU as Softplus of this steepness.

    Raises:
        ValueError: If ``fraction`` is not in (0, 1].

    Example:
        >>> import torch
        >>> from captum_priors.stability import SaliencyGuided
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # the second feature does not count
        >>> model = lambda x: x @ weight.T
        >>> SaliencyGuided(model, fraction=0.5)(torch.randn(4, 2), target=0).item()
        0.0
    """

    def __init__(
        self,
        forward_func: Any,
        fraction: float = 0.5,
        *,
        absolute: bool = True,
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(forward_func, reduction=reduction, smooth=smooth)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            fraction = float("nan")
        if not 0 < fraction <= 1:
            raise ValueError(
                expected_found(
                    "`fraction`", "a number in (0, 1]", repr(fraction), "The paper takes 0.5."
                )
            )
        self.fraction, self.absolute = float(fraction), absolute

    def _scores(self, call: Call) -> Tensor:
        with torch.no_grad():
            masked = self._masked(call)
        points = tuple(torch.cat([x, m]) for x, m in zip(call.inputs, masked, strict=True))
        here, there = F.log_softmax(logits_of(call.outputs(points)), 1).chunk(2)
        return F.kl_div(there, here, reduction="none", log_target=True).sum(1)

    def _masked(self, call: Call) -> Tensors:
        """Replace the least salient features, all tensors of an example ranked together."""
        saliency = flat_rows(input_gradients(call.output, call.inputs))
        if self.absolute:
            saliency = saliency.abs()
        count = max(1, round(self.fraction * saliency.shape[1]))
        least = saliency.topk(count, dim=1, largest=False).indices
        chosen = torch.zeros_like(saliency, dtype=torch.bool).scatter(1, least, True)
        masked = []
        widths = [x[0].numel() for x in call.inputs]
        for x, mask in zip(call.inputs, chosen.split(widths, 1), strict=True):
            rows = x.detach().reshape(len(x), -1)
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
            noise = low + (high - low) * torch.rand_like(rows)
            masked.append(torch.where(mask, noise, rows).reshape(x.shape))
        return tuple(masked)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"fraction": self.fraction}
        return options if self.absolute else {**options, "absolute": False}
