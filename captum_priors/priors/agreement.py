"""The agreement prior: two explainers that say the same about a model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from captum_priors._checks import positive, share
from captum_priors._shown import shown
from captum_priors.distances import pearson, soft_spearman
from captum_priors.engine import derive
from captum_priors.priors.attribution import ExplainerPrior
from captum_priors.priors.base import Call
from captum_priors.priors.terms import TermOptions, Unannotated


class AgreementPrior(Unannotated):
    r"""Penalise how far the attributions of two explainers are from correlated.

    .. math:: \mu\, \frac{1 - \rho_s(\Phi_a, \Phi_b)}{2}
        + (1 - \mu)\, \frac{1 - \rho(\Phi_a, \Phi_b)}{2}

    with Pearson's correlation :math:`\rho` and that of soft ranks :math:`\rho_s`
    (:func:`captum_priors.distances.pearson` and :func:`~captum_priors.distances.soft_spearman`),
    in [0, 1] (PEAR, Schwarzschild et al. 2023, who explain by gradients and integrated gradients).
    Take a pair that can agree: what is multiplied by the inputs changes sign with them, a gradient
    does not. Each explainer has random numbers of its own. The ``baselines`` of a call are for
    those that take them and were not given their own. A tuple of attributions gives the sum over
    its tensors.

    Args:
        explainer_a: An explainer that :func:`captum_priors.differentiable` takes.
        explainer_b: Another, whose attributions have the same shape.
        mix: :math:`\mu`, from 0 to 1.
        strength: That of the soft ranks.
        options_a: What else the ``attribute`` of the first is to be given at every call, such as
            ``{"abs": False}`` for :class:`captum.attr.Saliency`, whose attributions are absolute.
        options_b: The same for the second.
        options: ``reduction``, ``smooth``, ``batch_norm``, ``name`` of :class:`Term`.

    Raises:
        NotDifferentiableError: If an explainer cannot be trained on.
        TypeError: If an option is not one of the explainer's.
        ValueError: If ``mix`` or ``strength`` is out of range, or the shapes differ.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient, IntegratedGradients
        >>> from captum_priors.priors import AgreementPrior
        >>> model = torch.nn.Linear(5, 2)
        >>> prior = AgreementPrior(InputXGradient(model), IntegratedGradients(model))
        >>> value = prior(torch.randn(4, 5), target=1)  # the same, where the model is linear
        >>> torch.allclose(value, torch.zeros(()), atol=1e-6)
        True
    """

    _records: ClassVar[bool] = False

    def __init__(
        self,
        explainer_a: Any,
        explainer_b: Any,
        *,
        mix: float = 0.5,
        strength: float = 10.0,
        options_a: Mapping[str, Any] | None = None,
        options_b: Mapping[str, Any] | None = None,
        **options: Unpack[TermOptions],
    ) -> None:
        sides = _Side(explainer_a, options_a, 0), _Side(explainer_b, options_b, 1)
        super().__init__(sides[0].explainer, **options)
        self.mix, self.strength = share("mix", mix), positive("strength", strength, example=10)
        self.options_a, self.options_b = options_a, options_b
        self.a, self.b = sides
        self.takes_tensors = all(side.takes_tensors for side in sides)
        self.draws = tuple(dict.fromkeys(name for side in sides for name in side.draws))
        self.replayed = any(side.replayed for side in sides)

    def takes(self, name: str) -> bool:
        """Whether one of the explainers takes baselines and has none of its own."""
        return self.a.takes(name) or self.b.takes(name)

    def _explained(self) -> tuple[Any, ...]:
        return self.a.explainer, self.b.explainer

    def _way(self) -> str:
        ways = {self.a._way(), self.b._way()}
        return ways.pop() if len(ways) == 1 else "double_backprop"  # which asks for most

    def _described(self) -> list[str]:
        return [shown(self.a.explainer), shown(self.b.explainer)]

    def _check_call(
        self, inputs: Any, baselines: Any, target: Any, annotations: dict[str, Any]
    ) -> None:
        super()._check_call(inputs, baselines, target, annotations)
        for side in (self.a, self.b):
            side._check_call(inputs, side.baselines(baselines), target, {})

    def _scores(self, call: Call) -> Tensor:
        a, b = self.a._scores(call), self.b._scores(call)
        by_value = (1 - self.mix) / 2 * pearson(a, b)
        if self.mix == 0:  # comparing each entry with each is dear
            return by_value
        return self.mix / 2 * soft_spearman(a, b, strength=self.strength) + by_value


class _Side(ExplainerPrior):
    """One of the explainers: what it is asked, and what it says."""

    def __init__(self, explainer: Any, options: Mapping[str, Any] | None, place: int) -> None:
        super().__init__(explainer, pearson, dict(options or {}))
        self.place = place

    def takes(self, name: str) -> bool:
        """Whether the explainer takes baselines and was not given its own."""
        return name == "baselines" and name not in self.options and super().takes(name)

    def baselines(self, of_call: Any) -> Any:
        """Those of a call, where they are for this explainer."""
        return of_call if self.takes("baselines") else None

    def _scores(self, call: Call) -> Any:
        """Attributions."""
        options = self.options_of(replace(call, baselines=self.baselines(call.baselines)))
        options = self._drawing(options, derive(call.seed, self.place), call)
        return self._maps(self.explainer.attribute(call.given, **options), call)
