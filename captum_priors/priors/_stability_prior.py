"""The stability prior: attributions that stay when the input moves a little."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple, like_inputs
from captum_priors._engine._random import seed_global
from captum_priors._errors import expected_found
from captum_priors._types import Distance, TensorOrTuple
from captum_priors.priors._explainer_prior import ExplainerPrior, parameters_of
from captum_priors.priors._leaf_prior import Reduction


class StabilityPrior(ExplainerPrior):
    r"""Penalise how far attributions move when the inputs are perturbed.

    .. math:: \mathbb{E}\; d\left(\Phi(\theta, x), \Phi(\theta, \tilde x)\right),
        \qquad \tilde x = \mathrm{perturb}(x)

    Both sides use the same random numbers: otherwise the prior would penalise the sampling of the
    explainer. The perturbed inputs are constants; the gradient flows through both attributions.

    Args:
        explainer: An explainer that :func:`captum_priors.differentiable` takes.
        distance: ``distance(attributions, other)`` of shape ``(batch,)``.
        perturbation: A :class:`captum.robust.Perturbation`, such as those of
            :mod:`captum_priors.attacks`, or a function, of the inputs. It is also given ``target``,
            ``additional_forward_args`` and ``baselines`` where it takes them; other arguments of an
            attack are bound first, as in ``lambda x, target: fgsm.perturb(x, 0.1, target)``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: As in :class:`AttributionPrior`.
        attribute_options: As in :class:`AttributionPrior`.

    Raises:
        NotDifferentiableError: If the explainer cannot be trained on.
        TypeError: If an option is not one of the explainer's.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors import StabilityPrior
        >>> from captum_priors.distances import mse
        >>> noise = lambda x: x + 0.1 * torch.randn_like(x)
        >>> prior = StabilityPrior(Saliency(torch.nn.Linear(3, 1)), mse, noise)
        >>> prior(torch.randn(4, 3)).item()  # a linear model has the same gradient everywhere
        0.0
    """

    _score_name = "distance"
    _score_module = "distances"

    def __init__(
        self,
        explainer: Any,
        distance: Distance,
        perturbation: Any,
        *,
        reduction: Reduction = "mean",
        smooth: float | None = None,
        **attribute_options: Any,
    ) -> None:
        super().__init__(
            explainer, distance, reduction=reduction, smooth=smooth, options=attribute_options
        )
        perturb = getattr(perturbation, "perturb", perturbation)
        if not callable(perturb):
            raise TypeError(
                expected_found(
                    "`perturbation`",
                    "a captum.robust.Perturbation or a function of the inputs",
                    type(perturbation).__name__,
                    "Pass for example lambda x: x + 0.1 * torch.randn_like(x).",
                )
            )
        # Past nn.Module's registration, like the explainer: an attack may hold the model.
        self.__dict__["perturbation"] = perturbation
        self.__dict__["_perturb"] = perturb

    perturbation: Any
    _perturb: Any

    @property
    def distance(self) -> Distance:
        """The distance."""
        distance: Distance = self.score
        return distance

    def _scores(
        self, inputs: TensorOrTuple, call: dict[str, Any], annotations: dict[str, Any], seed: int
    ) -> Any:
        generator: torch.Generator | None = call.get("generator")
        with self.model_held():
            moved = self._moved(inputs, call)
            seed_global(seed)
            state = generator.get_state() if generator is not None else torch.empty(0)
            here = self.explain(inputs, call)
            seed_global(seed)
            if generator is not None:
                generator.set_state(state)
            there = self.explain(moved, call)
        return self._score((here, there), annotations)

    def _moved(self, inputs: TensorOrTuple, call: dict[str, Any]) -> TensorOrTuple:
        known = parameters_of(self._perturb)
        given = ("target", "additional_forward_args", "baselines")
        extra = {k: call[k] for k in given if k in call and k in known}
        moved: TensorOrTuple = self._perturb(inputs, **extra)
        if not self.takes_tensors:
            return moved
        each = moved if isinstance(moved, tuple) else (moved,)
        shapes = [tuple(t.shape) for t in as_tuple(inputs)]
        found = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in each]
        if found != shapes:
            raise ValueError(
                expected_found(
                    "`perturbation`",
                    f"perturbed inputs of shapes {shapes}",
                    str(found),
                    "Return tensors like the inputs.",
                )
            )
        return like_inputs(inputs, tuple(t.detach() for t in each))

    def _described(self) -> list[Any]:
        return [self.score, self.perturbation]
