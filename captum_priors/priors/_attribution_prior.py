"""The attribution prior: an explainer and a penalty on what it says."""

from typing import Any

from captum_priors._types import Penalty, TensorOrTuple
from captum_priors.priors._explainer_prior import ExplainerPrior
from captum_priors.priors._leaf_prior import Reduction


class AttributionPrior(ExplainerPrior):
    r"""Penalise the attributions of a model while it trains.

    .. math:: \theta = \arg\min_\theta \mathcal L(\theta; X, y) + \lambda\, \Omega(\Phi(\theta, X))

    (Erion et al. 2021): the prior is :math:`\Omega(\Phi)`, and :math:`\lambda` is
    written ``weight * prior``. The attribution pass runs with the model held still: evaluation
    mode, hence no dropout and stored BatchNorm statistics, put back afterwards.

    Args:
        explainer: An explainer that :func:`captum_priors.differentiable` takes.
        penalty: ``penalty(attributions, **annotations)`` of shape ``(batch,)`` or ``()``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run the attribution pass with ReLU as Softplus of this steepness. Double
            backpropagation does not see the kinks of ReLU; 30 is a good start.
        attribute_options: What else ``explainer.attribute`` is to be given at every call, such as
            ``baselines`` or ``n_samples``.

    Raises:
        NotDifferentiableError: If the explainer cannot be trained on.
        TypeError: If an option is not one of the explainer's.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients
        >>> from captum_priors.penalties import l2
        >>> model = torch.nn.Linear(3, 1)
        >>> x, background = torch.randn(4, 3), torch.randn(9, 3)
        >>> prior = AttributionPrior(ExpectedGradients(model), l2, baselines=background)
        >>> expected = l2(model.weight * (x - background.mean(0))).mean()
        >>> torch.allclose(prior(x), expected, rtol=1e-4)
        True
    """

    def __init__(
        self,
        explainer: Any,
        penalty: Penalty,
        *,
        reduction: Reduction = "mean",
        smooth: float | None = None,
        **attribute_options: Any,
    ) -> None:
        super().__init__(
            explainer, penalty, reduction=reduction, smooth=smooth, options=attribute_options
        )

    @property
    def penalty(self) -> Penalty:
        """The penalty."""
        penalty: Penalty = self.score
        return penalty

    def _scores(
        self, inputs: TensorOrTuple, call: dict[str, Any], annotations: dict[str, Any], seed: int
    ) -> Any:
        with self.model_held():
            attributions = self.explain(inputs, call)
        return self._score((attributions,), annotations)
