"""R2ET: the most important features stay the most important."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_priors._checks import count, nonnegative, positive
from captum_priors._errors import refusal
from captum_priors.penalties.maths import safe_norm
from captum_priors.priors.base import Call
from captum_priors.stability.base import GradientRegularizer, Shared, flat_rows


class R2ET(GradientRegularizer):
    r"""Widen the gap between the top-k gradients and the rest, and keep them from turning.

    .. math:: \frac{1}{|T|\,|R|} \sum_{i \in T} \sum_{j \in R} e^{|g_j| - |g_i|}
        + c\, \frac{\lVert\nabla f(x + hz) - g\rVert_2}{h}, \qquad g = \nabla f(x),\quad
        z = \mathrm{sign}\, g / \lVert\mathrm{sign}\, g\rVert_2

    for the output :math:`f` that ``target`` selects (Wang et al. 2024, ranking explanation
    thickness). :math:`T` are the k features with the largest :math:`|g|` and :math:`R` the others,
    of the model as it is: they and :math:`z` are constants. Each entry of an example is a feature.

    The gap is one of gradients, so scaling :math:`f` widens it: look at accuracy and calibration,
    too. The authors' code differs: it sums over pairs and rescales the weight at every step, takes
    the gradient of the loss (pass a ``forward_func`` that returns it), sums :math:`|g|` over colour
    channels, and moves by the sign divided by the number of features.

    Args:
        forward_func: The model, or a function.
        top_k: Size of :math:`T`, less than the number of features.
        n_nearest: Compare only the so many smallest of :math:`T` with the so many largest of
            :math:`R`, the pairs that an attack would exchange first. None compares all.
        curvature: :math:`c`; 0 for none, at half the cost.
        step_size: :math:`h`, in units of the inputs.
        options: As in :class:`InputGradientRegularization`.

    Raises:
        ValueError: If an option is not one of those above.

    Example:
        >>> import torch
        >>> from captum_priors.stability import R2ET
        >>> linear = lambda x: x @ torch.tensor([1.0, -3.0, 0.0])
        >>> value = R2ET(linear, top_k=1)(torch.randn(4, 3))  # no curvature
        >>> torch.allclose(value, (torch.tensor([1.0, 0.0]) - 3).exp().mean())
        True
    """

    def __init__(
        self,
        forward_func: Any,
        *,
        top_k: int,
        n_nearest: int | None = None,
        curvature: float = 1.0,
        step_size: float = 0.1,
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(forward_func, **options)
        self.top_k, self.curvature = count("top_k", top_k), nonnegative("curvature", curvature)
        self.n_nearest = None if n_nearest is None else count("n_nearest", n_nearest)
        self.step_size = positive("step_size", step_size)

    def _scores(self, call: Call) -> Tensor:
        features = sum(x[0].numel() for x in call.inputs)
        if self.top_k >= features:
            raise refusal(
                ValueError,
                "`top_k`",
                f"fewer than the {features} features",
                str(self.top_k),
                "Lower it: what is not in the top is compared with it.",
            )
        if self.curvature == 0:
            return self._overlap(flat_rows(self._input_gradients(call, call.inputs)))
        here, there = self._gradients_along_sign(call, self.step_size)
        turning = safe_norm(there - here) / self.step_size
        return self._overlap(here) + self.curvature * turning

    def _overlap(self, gradients: Tensor) -> Tensor:
        """Mean over pairs; their sum is a product of one for the top and one for the rest."""
        size, k, near = gradients.abs(), self.top_k, self.n_nearest
        order = size.detach().argsort(1, descending=True)
        ranked = size.gather(1, order)
        top, rest = ranked[:, :k], ranked[:, k:]
        if near is not None:
            top, rest = top[:, -near:], rest[:, :near]
        pairs = top.shape[1] * rest.shape[1]
        # In logarithms: the factors overflow where their product does not.
        return torch.exp(rest.logsumexp(1) + (-top).logsumexp(1)) / pairs
