"""The stability prior: attributions that stay when the input moves a little."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_priors._captum import like_inputs
from captum_priors._errors import refusal, type_of
from captum_priors._rows import carried
from captum_priors._shown import shown
from captum_priors._types import Distance, TensorOrTuple
from captum_priors.engine import derive
from captum_priors.engine.model import BatchNorm, call_beside
from captum_priors.priors.annotated import OF_EACH, Missing
from captum_priors.priors.attribution import ExplainerPrior, parameters_of
from captum_priors.priors.base import Call, Reduction

GIVEN = ("target", "additional_forward_args", "baselines", "annotation")
"""What a perturbation is given by keyword where it declares it."""


class StabilityPrior(ExplainerPrior):
    r"""Penalise how far attributions move when the inputs are perturbed.

    .. math:: \mathbb{E}\; d\left(\Phi(\theta, x), \Phi(\theta, \tilde x)\right),
        \qquad \tilde x = \mathrm{perturb}(x)

    Both sides use the same random numbers, and the perturbation others: the prior would penalise
    the sampling of the explainer. What the perturbation adds is a constant; the gradient flows
    through both attributions.

    Args:
        explainer: An explainer that :func:`captum_priors.differentiable` takes.
        distance: ``distance(attributions, other)`` of shape ``(batch,)``.
        perturbation: A :class:`captum.robust.Perturbation`, such as those of
            :mod:`captum_priors.attacks`, or a function, of the inputs. It is also given ``target``,
            ``additional_forward_args``, ``baselines`` and ``annotation`` where it takes them (an
            attack of ours moves only what the annotation does not allow, where it is 0); other
            arguments of an attack are bound first, as in ``lambda x, target: fgsm.perturb(x, 0.1,
            target)``. Its random numbers are torch's; ``perturbation.draws`` names others.
        reduction, smooth, batch_norm, missing, name: As in :class:`Term`.
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

    _name_of_score: ClassVar[str] = "distance"
    _module_of_score: ClassVar[str] = "distances"
    _n_maps: ClassVar[int] = 2
    perturbation: Any

    def __init__(
        self,
        explainer: Any,
        distance: Distance,
        perturbation: Any,
        *,
        reduction: Reduction = "mean",
        smooth: float | None = None,
        batch_norm: BatchNorm = "batch",
        missing: Missing = "refuse",
        name: str | None = None,
        **attribute_options: Any,
    ) -> None:
        of_term = {"reduction": reduction, "smooth": smooth, "missing": missing, "name": name}
        super().__init__(explainer, distance, attribute_options, batch_norm=batch_norm, **of_term)
        if isinstance(perturbation, type) or not callable(_perturb_of(perturbation)):
            raise refusal(
                TypeError,
                "`perturbation`",
                "a captum.robust.Perturbation or a function of the inputs",
                type_of(perturbation),
                "Pass for example lambda x: x + 0.1 * torch.randn_like(x).",
            )
        # Past nn.Module's registration, like the explainer: an attack may hold the model.
        self.__dict__["perturbation"] = perturbation
        asked = parameters_of(_perturb_of(perturbation)).get("annotation")
        if asked is not None and asked.default is asked.empty:
            said = f"what {shown(perturbation)} is confined by"
            self._needed = {"annotation": (said, OF_EACH), **self._needed}
        self.draws = tuple({*self.draws, *getattr(perturbation, "draws", ())})

    @property
    def distance(self) -> Distance:
        """The distance."""
        return self.score

    def takes(self, name: str) -> bool:
        """Whether explainer, distance or perturbation takes the keyword."""
        perturbs = name == "annotation" and name in parameters_of(_perturb_of(self.perturbation))
        return perturbs or super().takes(name)

    def _described(self) -> list[str]:
        explainer, distance, *options = super()._described()
        return [explainer, distance, shown(self.perturbation), *options]

    def _takes_several(self) -> bool:
        # A perturbation that is told the target is another for each output.
        told = "target" in parameters_of(_perturb_of(self.perturbation))
        return not told and super()._takes_several()

    def _scores(self, call: Call) -> Any:
        options, seed = self.options_of(call), derive(call.seed, 0)
        moved = self._moved(call, options)
        again = dict(options)
        if isinstance(options.get("generator"), torch.Generator):
            again["generator"] = options["generator"].clone_state()
        here, there = (
            self._maps(self.explainer.attribute(x, **self._drawing(each, seed, call)), call)
            for x, each in ((call.given, again), (moved, options))
        )
        return self._score((here, there), call)

    def _moved(self, call: Call, options: dict[str, Any]) -> TensorOrTuple:
        perturb = _perturb_of(self.perturbation)
        given = {**options, "annotation": call.keywords().get("annotation")}
        known = [name for name in parameters_of(perturb) if name in GIVEN]
        extra = {name: given[name] for name in known if given.get(name) is not None}
        call.explaining.seed(derive(call.seed, 1))
        moved: TensorOrTuple = call_beside(perturb, _copies(call.given), **extra)
        if not self.takes_tensors:
            return moved
        each = moved if isinstance(moved, tuple) else (moved,)
        expected, found = list(map(_form, call.inputs)), list(map(_form, each))
        if found != expected:
            raise refusal(
                ValueError,
                "`perturbation`",
                f"perturbed inputs of shape, dtype and device {expected}",
                found,
                "Return tensors like the inputs.",
            )
        return like_inputs(call.given, carried(call.inputs, each))


def _perturb_of(perturbation: Any) -> Any:
    return getattr(perturbation, "perturb", perturbation)


def _form(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return type_of(tensor)
    return tuple(tensor.shape), tensor.dtype, str(tensor.device)


def _copies(inputs: Any) -> Any:
    """Return copies, because a perturbation may work in place."""
    if isinstance(inputs, tuple):
        return tuple(map(_copies, inputs))
    return inputs.clone() if isinstance(inputs, Tensor) else inputs
