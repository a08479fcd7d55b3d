"""Attributions against a person's annotation of where the evidence is."""

from typing import Any, Literal

from torch import Tensor

from captum_priors._errors import expected_found, one_of
from captum_priors._lift import cosine_distance, flat, in_units_of_largest, lift_penalty


@lift_penalty
def outside(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    r"""Squared attribution outside the annotation: right for the right reasons.

    .. math:: \sum_i \left((1 - M_i)\, \phi_i\right)^2

    (Ross, Hughes, Doshi-Velez 2017, whose mask :math:`A = 1 - M` marks what is
    forbidden.)

    Args:
        attributions: ``(batch, ...)``.
        annotation: :math:`M`, 1 where evidence may lie and 0 where it may not; broadcast to the
            attributions, ``(batch, height, width)`` to all channels.

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
    mask = _mask(attributions, annotation)
    return flat((1 - mask) * attributions).square().sum(1)


@lift_penalty
def energy_outside(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    r"""Share of the positive attribution that lies outside the annotation.

    .. math:: 1 - \frac{\sum_i M_i \phi_i^+}{\sum_i \phi_i^+}

    (Rao et al. 2023, energy loss: tolerant of coarse boxes.) Channels are summed first where the
    annotation has one channel or none.

    Args:
        attributions: ``(batch, ...)``.
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
    annotation = _tensor(annotation, attributions)
    if attributions.dim() == 4:
        if annotation.dim() == 3 and len(annotation) == len(attributions):
            annotation = annotation.unsqueeze(1)
        if annotation.dim() < 3 or annotation.shape[-3] == 1:
            attributions = attributions.sum(1, keepdim=True)
    mask = _mask(attributions, annotation)
    positive = in_units_of_largest(flat(attributions.relu()), 1)
    return (positive * flat(1 - mask)).sum(1) / positive.sum(1).clamp_min(1)


@lift_penalty
def alignment(
    attributions: Tensor, *, annotation: Tensor, measure: Literal["cosine", "mse"] = "cosine"
) -> Tensor:
    r"""Distance of the attributions from a given map.

    .. math:: 1 - \frac{\langle\phi, M\rangle}{\lVert\phi\rVert \lVert M\rVert}
        \quad\text{or}\quad \tfrac1p \sum_i (\phi_i - M_i)^2

    Args:
        attributions: ``(batch, ...)``.
        annotation: The map :math:`M`, any real numbers; broadcast to the attributions.
        measure: ``"cosine"`` ignores scale, ``"mse"`` does not.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If the annotation does not fit.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import alignment
        >>> phi = torch.tensor([[3.0, 4.0]])
        >>> torch.allclose(alignment(phi, annotation=2 * phi), torch.zeros(1), atol=1e-6)
        True
    """
    one_of("measure", measure, ("cosine", "mse"))
    given = flat(_fit(attributions, annotation))
    rows = flat(attributions)
    if measure == "mse":
        return (rows - given).square().mean(1)
    return cosine_distance(rows, given)


def _tensor(annotation: Any, attributions: Tensor) -> Tensor:
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
    return annotation


def _fit(attributions: Tensor, annotation: Tensor) -> Tensor:
    annotation = _tensor(annotation, attributions)
    if annotation.dim() == attributions.dim() - 1 > 1 and len(annotation) == len(attributions):
        annotation = annotation.unsqueeze(1)  # one map for each example, shared by its channels
    try:
        return annotation.to(attributions.dtype).expand_as(attributions)
    except RuntimeError:
        raise ValueError(
            expected_found(
                "`annotation`",
                f"a shape that broadcasts to the attributions' {tuple(attributions.shape)}",
                str(tuple(annotation.shape)),
                "Add the missing dimensions with unsqueeze, or resize the annotation.",
            )
        ) from None


def _mask(attributions: Tensor, annotation: Tensor) -> Tensor:
    mask = _fit(attributions, annotation)
    if not bool(((mask >= 0) & (mask <= 1)).all()):  # also true of NaN
        raise ValueError(
            expected_found(
                "`annotation`",
                "values from 0 (evidence may not lie here) to 1 (it may)",
                f"values from {mask.min().item():g} to {mask.max().item():g}",
                "Scale the mask to [0, 1].",
            )
        )
    return mask
