"""A differentiable stand-in for the share of top features that two attributions have in common."""

import torch
from torch import Tensor, nn

from captum_priors._checks import check_count
from captum_priors._errors import expected_found
from captum_priors._lift import cosine_distance, flat, in_units_of_largest, lift_distance


class SoftTopK(nn.Module):
    r"""One minus the overlap of the ``k`` largest absolute attributions of two maps.

    Feature :math:`i` belongs to the top to the degree
    :math:`m_i = \sigma\left((|\phi_i| - t_k) / (T\, s)\right)`, where :math:`t_k` lies half-way
    between the k-th and the next largest and :math:`s` is the mean absolute attribution; the
    distance is :math:`1 - \langle m^a, m^b\rangle / (\lVert m^a\rVert \lVert m^b\rVert)`. For small
    :math:`T` it tends to one minus the top-k intersection of Ghorbani et al. 2019, which is what
    metrics report and has no gradient.

    Args:
        k: Number of top features.
        temperature: :math:`T`, the softness of membership relative to the mean attribution.

    Raises:
        ValueError: If ``k`` or ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> from captum_priors.distances import SoftTopK
        >>> a, b = torch.tensor([[9.0, 8.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.0, 8.0, 1.0]])
        >>> round(SoftTopK(2, temperature=0.01)(a, b).item(), 4)
        0.5
    """

    def __init__(self, k: int, *, temperature: float = 0.1) -> None:
        super().__init__()
        check_count("k", k)
        if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
            raise ValueError(
                expected_found(
                    "`temperature`", "a positive number", repr(temperature), "Pass for example 0.1."
                )
            )
        self.k, self.temperature = k, temperature

    def forward(self, attributions: Tensor, other: Tensor) -> Tensor:
        """Return the distance of each example: shape ``(batch,)``."""
        return lift_distance(self._distance)(attributions, other)

    def _distance(self, attributions: Tensor, other: Tensor) -> Tensor:
        left, right = self._membership(attributions), self._membership(other)
        return cosine_distance(left, right)

    def _membership(self, attributions: Tensor) -> Tensor:
        size = in_units_of_largest(flat(attributions).abs(), 1)
        if size.shape[1] <= self.k:
            raise ValueError(
                expected_found(
                    "`k`", f"fewer than the {size.shape[1]} features", str(self.k), "Lower k."
                )
            )
        top = size.topk(self.k + 1, dim=1).values
        threshold = top[:, -2:].mean(1, keepdim=True)
        scale = size.mean(1, keepdim=True).clamp_min(1 / size.shape[1])
        return torch.sigmoid((size - threshold) / (self.temperature * scale))

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f"k={self.k}, temperature={self.temperature}"
