"""Make a map look like another one (Dombrowski et al. 2019)."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._errors import expected_found
from captum_priors._importance import importance_rows
from captum_priors._types import TensorOrTuple
from captum_priors.attacks._base import AttributionAttack, Maps


class ManipulationAttack(AttributionAttack):
    r"""Make the map look like a given other one, while the output stays.

    .. math:: J = -\tfrac1p \sum_i \left(h_i(\tilde x) - h_i^t\right)^2
        - \gamma \lVert \mathrm{softmax} f(\tilde x) - \mathrm{softmax} f(x) \rVert^2,
        \qquad h = p\, |\phi| \Big/ \sum_i |\phi_i|

    (Dombrowski et al. 2019, whose maps sum to one rather than average one. Their weights
    1e11 and 1e6 on a VGG16 with 224 × 224 pixels and 1000 classes amount to :math:`\gamma` = 25,
    the default of ``output_weight``.) They let a small step keep the change invisible; here a ball
    does.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.
        target_map: What maps are to look like, in the shape of the attributions or of one example
            of them, or a tuple of these. By default each example imitates the clean map of the
            next one in the batch, as in the paper; a single example its own, reversed.
        output_weight: :math:`\gamma`.
        options: Options of :class:`AttributionAttack`.

    Raises:
        TypeError: If the target map is no tensor.
        ValueError: If it does not fit the attributions.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors.attacks import ManipulationAttack
        >>> model, x = torch.nn.Linear(3, 1), torch.ones(2, 3)
        >>> wanted = torch.tensor([1.0, 2.0, 3.0])
        >>> attack = ManipulationAttack(
        ...     InputXGradient(model), wanted / model.weight[0].abs().detach(), radius=0.5)
        >>> attack.perturb(x).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        explainer: Any,
        target_map: TensorOrTuple | None = None,
        *,
        output_weight: float = 25.0,
        **options: Any,
    ) -> None:
        for each in target_map if isinstance(target_map, tuple) else (target_map,):
            if each is not None and not isinstance(each, Tensor):
                raise TypeError(
                    expected_found(
                        "`target_map`",
                        "a tensor or a tuple of tensors",
                        type(each).__name__,
                        "Pass attributions, or leave it out.",
                    )
                )
        super().__init__(explainer, output_weight=output_weight, **options)
        self.target_map = target_map

    def prepare(self, attributions: Maps) -> Tensor:
        """Return the target maps in their normal form: ``(batch, places)``."""
        if self.target_map is None:
            own = self._normal(attributions)
            return own.roll(-1, 0) if own.shape[0] > 1 else own.flip(1)
        return self._normal(self._like(attributions))

    def objective(self, attributions: Maps, clean: Tensor) -> Tensor:
        """Minus the mean squared difference to the target maps."""
        return -(self._normal(attributions) - clean).square().mean(1)

    def _normal(self, maps: Maps) -> Tensor:
        rows = importance_rows(maps, self.spatial_dims)
        mean = rows.mean(1, keepdim=True)
        return rows / torch.where(mean > 0, mean, 1)

    def _like(self, attributions: Maps) -> Maps:
        wanted = as_tuple(self.target_map) if self.target_map is not None else ()
        shapes = [tuple(a.shape) for a in attributions]
        try:
            if len(wanted) != len(attributions):
                raise RuntimeError("another number of tensors")
            return tuple(
                w.detach().to(a).expand_as(a) for w, a in zip(wanted, attributions, strict=True)
            )
        except RuntimeError as error:
            raise ValueError(
                expected_found(
                    "`target_map`",
                    f"maps that fit attributions of shapes {shapes}",
                    str([tuple(w.shape) for w in wanted]),
                    "Pass one map for all examples, or one for each.",
                )
            ) from error
