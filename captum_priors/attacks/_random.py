"""Noise of an attack's size: what an attack has to beat."""

from typing import Any, Literal

import torch

from captum_priors._captum import like_inputs
from captum_priors._checks import check_count
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._mismatch import names_mismatch
from captum_priors._errors import one_of
from captum_priors._probe import forward_func_of
from captum_priors._types import TensorOrTuple
from captum_priors.attacks._ball import Norm
from captum_priors.attacks._base import BoundedPerturbation, SamePrediction

Distribution = Literal["surface", "uniform"]


class RandomAttack(BoundedPerturbation):
    r"""A random point of the ball: the control that an attack at the same radius is compared with.

    ``"surface"`` draws :math:`x \pm r` in every entry (``"Linf"``; the random sign perturbation of
    Ghorbani, Abid, Zou 2019) or a direction of length :math:`r` (``"L2"``), as far
    from :math:`x` as an attack can go; ``"uniform"`` draws from the whole ball. A draw that
    changes the prediction is replaced by another, ``n_tries`` times in all, and then by the clean
    input.

    Args:
        explainer: An explainer, for its model alone, so that this is made as attacks are; or the
            model.
        radius: As in :class:`AttributionAttack`, like the other options.
        norm: ``"Linf"`` or ``"L2"``.
        distribution: ``"surface"`` or ``"uniform"``.
        n_tries: Draws for an example whose prediction changes.
        lower_bound: Least valid value.
        upper_bound: Largest valid value.
        keep_prediction: Whether, or how, the prediction must stay. Without, one draw is final and
            no model is run: noise for :class:`captum_priors.StabilityPrior`.
        forward_func: The model; by default the explainer's.
        seed: Seed of the draws; by default read off torch's global generator, which does not move.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from captum_priors.attacks import RandomAttack
        >>> x = torch.zeros(2, 3)
        >>> noise = RandomAttack(torch.nn.Linear(3, 1), radius=0.1, keep_prediction=False)
        >>> torch.equal(noise.perturb(x).abs(), torch.full((2, 3), 0.1))
        True
    """

    is_control = True

    def __init__(
        self,
        explainer: Any = None,
        *,
        radius: float | tuple[float, ...],
        norm: Norm = "Linf",
        distribution: Distribution = "surface",
        n_tries: int = 10,
        lower_bound: Any = float("-inf"),
        upper_bound: Any = float("inf"),
        keep_prediction: bool | SamePrediction = True,
        forward_func: Any = None,
        seed: int | None = None,
    ) -> None:
        if forward_func is None and explainer is not None:
            explains = callable(getattr(explainer, "attribute", None))
            forward_func = forward_func_of(explainer) if explains else explainer
        super().__init__(
            forward_func,
            radius=radius,
            norm=norm,
            lower_bound=lower_bound,
            upper_bound=upper_bound,
            keep_prediction=keep_prediction,
            seed=seed,
        )
        one_of("distribution", distribution, ("surface", "uniform"))
        check_count("n_tries", n_tries)
        self.distribution, self.n_tries = distribution, n_tries

    @names_mismatch
    @leaves_inference_mode
    def perturb(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> TensorOrTuple:
        """Return random inputs near the given ones, detached.

        Args:
            inputs: Tensor ``(batch, ...)`` or a tuple of them, within the bounds.
            target: Taken for the sake of the common signature; noise has no target.
            additional_forward_args: Further arguments of the model.

        Returns:
            Tensors like ``inputs``.

        Raises:
            TypeError: If an argument has another type.
            ValueError: If inputs leave the bounds.
        """
        region = self._checked(inputs, target)
        with self._undisturbed():
            found = tuple(ball.draw(self.distribution) for ball in region)
            if not self.keep_prediction:
                return like_inputs(inputs, found)
            clean = tuple(ball.centre for ball in region)
            outputs = self._outputs(clean, additional_forward_args)
            settled = self._keeps(self._outputs(found, additional_forward_args), outputs)
            for _ in range(self.n_tries - 1):
                if bool(settled.all()):
                    break
                drawn = tuple(ball.draw(self.distribution) for ball in region)
                keeps = self._keeps(self._outputs(drawn, additional_forward_args), outputs)
                found = _choose(settled, found, drawn)
                settled = settled | keeps
            return like_inputs(inputs, _choose(settled, found, clean))


def _choose(
    first: torch.Tensor, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Take the examples marked from ``a``, the others from ``b``."""
    return tuple(
        torch.where(first.reshape(-1, *[1] * (s.dim() - 1)), s, t)
        for s, t in zip(a, b, strict=True)
    )
