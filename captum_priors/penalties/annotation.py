"""What a person says about the features: one rule for it, and the penalties that take it."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from captum_priors._errors import expected_found, one_of
from captum_priors.penalties.maths import (
    cosine_distance,
    flat,
    in_units_of_largest,
    lift_penalty,
)


@lift_penalty
def outside(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    r"""Squared attribution outside the annotation: right for the right reasons.

    .. math:: \sum_i \left((1 - M_i)\, \phi_i\right)^2

    (Ross, Hughes, Doshi-Velez 2017, whose mask :math:`A = 1 - M` marks what is
    forbidden.)

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        annotation: :math:`M`, 1 where evidence may lie and 0 where it may not, with the
            attributions' dimensions (:mod:`captum_priors.penalties` has the rule); or a tuple.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If the annotation does not fit, or leaves [0, 1].

    Example:
        >>> import torch
        >>> from captum_priors.penalties import outside
        >>> phi, allowed = torch.tensor([[3.0, 4.0]]), torch.tensor([[1, 0]])
        >>> outside(phi, annotation=allowed).item()
        16.0
    """
    mask = fitted(attributions, annotation, mask=True)
    return flat((1 - mask) * attributions).square().sum(1)


@lift_penalty
def energy_outside(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    r"""Share of the positive attribution that lies outside the annotation.

    .. math:: 1 - \frac{\sum_i M_i \phi_i^+}{\sum_i \phi_i^+}

    (Rao et al. 2023, energy loss: tolerant of coarse boxes.) What shares one value of the
    annotation is summed first: the channels, where it has one channel or none.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        annotation: :math:`M` as in :func:`outside`.

    Returns:
        Shape ``(batch,)``, in [0, 1]; 0 where no attribution is positive.

    Raises:
        ValueError: If the annotation does not fit, or leaves [0, 1].

    Example:
        >>> import torch
        >>> from captum_priors.penalties import energy_outside
        >>> phi, allowed = torch.tensor([[3.0, 1.0, -9.0]]), torch.tensor([[1, 0, 0]])
        >>> energy_outside(phi, annotation=allowed).item()
        0.25
    """
    mask = fitted(attributions, annotation, mask=True)
    shared = [d for d in range(1, mask.dim()) if mask.shape[d] == 1]
    evidence = attributions.sum(shared, keepdim=True) if shared else attributions
    positive = in_units_of_largest(flat(evidence.relu()), 1)
    return (positive * flat(1 - mask)).sum(1) / positive.sum(1).clamp_min(1)


@lift_penalty
def alignment(
    attributions: Tensor, *, annotation: Tensor, measure: Literal["cosine", "mse"] = "cosine"
) -> Tensor:
    r"""Distance of the attributions from a given map.

    .. math:: 1 - \frac{\langle\phi, M\rangle}{\lVert\phi\rVert \lVert M\rVert}
        \quad\text{or}\quad \tfrac1p \sum_i (\phi_i - M_i)^2

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        annotation: The map :math:`M`, any real numbers, with the attributions' dimensions as in
            :func:`outside`; or a tuple.
        measure: ``"cosine"`` ignores scale, ``"mse"`` does not.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If the annotation does not fit, or is not finite.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import alignment
        >>> phi = torch.tensor([[3.0, 4.0]])
        >>> torch.allclose(alignment(phi, annotation=2 * phi), torch.zeros(1), atol=1e-6)
        True
    """
    one_of("measure", measure, ("cosine", "mse"))
    given = flat(fitted(attributions, annotation, mask=False).expand_as(attributions))
    if measure == "mse":
        return (flat(attributions) - given).square().mean(1)
    return cosine_distance(flat(attributions), given)


def fitted(attributions: Tensor, annotation: Any, *, mask: bool) -> Tensor:
    """Give an annotation the attributions' dimensions and dtype, so that the two broadcast.

    It has the attributions' number of dimensions, each of the same size or 1: what has size 1 is
    shared, by the channels of ``(batch, 1, height, width)`` or, in the first place, by all
    examples. From four dimensions on the channels may be left out, ``(batch, height, width)``. A
    missing batch dimension is not guessed. All values are finite, and in [0, 1] in a mask.
    """
    given = _checked(attributions, annotation, mask=mask)
    shape = tuple(attributions.shape)
    fits = given.dim() == len(shape) and all(
        n in (1, size) for n, size in zip(given.shape, shape, strict=False)
    )
    if not fits:
        without = f", or {(shape[0], *shape[2:])} for all channels" if len(shape) > 3 else ""
        raise ValueError(
            expected_found(
                "`annotation`",
                f"one for each of the {shape[0]} examples, shape {shape}{without}",
                str(tuple(annotation.shape)),
                "Give what is the same for all examples, channels or places a dimension of size 1 "
                "with unsqueeze, or resize the annotation.",
            )
        )
    return given.to(attributions.dtype)


def resized(attributions: Tensor, annotation: Any, *, mask: bool) -> Tensor:
    """Average an annotation of images down to the size of maps ``(batch, channels, h, w)``."""
    given = _checked(attributions, annotation, mask=mask)
    size = (attributions.shape[-2], attributions.shape[-1])
    if given.dim() == attributions.dim() == 4 and tuple(given.shape[2:]) != size:
        given = F.adaptive_avg_pool2d(given.to(attributions.dtype), size)
    return fitted(attributions, given, mask=mask)


def _checked(attributions: Tensor, annotation: Any, *, mask: bool) -> Tensor:
    """Check type, device and values; add the channels where they are left out."""
    if not isinstance(annotation, Tensor):
        raise TypeError(
            expected_found(
                "`annotation`", "a tensor", type(annotation).__name__, "Use torch.as_tensor."
            )
        )
    if annotation.device != attributions.device:
        raise ValueError(
            expected_found(
                "`annotation`",
                f"device {attributions.device} as for the attributions",
                str(annotation.device),
                f"Move it with .to({str(attributions.device)!r}).",
            )
        )
    good = ((annotation >= 0) & (annotation <= 1)) if mask else annotation.isfinite()
    if not bool(good.all()):
        raise ValueError(
            expected_found(
                "`annotation`",
                "values from 0 (evidence may not lie here) to 1 (it may)"
                if mask
                else "finite numbers",
                first_of(annotation, ~good),
                "Scale the mask to [0, 1], and give a place that is not known a value."
                if mask
                else "Give a place that is not known a value, for example 0.",
            )
        )
    if annotation.dim() == attributions.dim() - 1 >= 3:
        return annotation.unsqueeze(1)
    return annotation


def first_of(annotation: Tensor, bad: Tensor) -> str:
    """Name the first place that is bad, and what stands there."""
    place = bad.nonzero()[0].tolist()
    return f"annotation{place} = {annotation[tuple(place)].item():g}"
