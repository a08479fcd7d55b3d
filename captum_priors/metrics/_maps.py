"""What one attribution map is like."""

import torch
from torch import Tensor

from captum_priors import penalties
from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple
from captum_priors.metrics._rows import joined, nan_where, tensors_of


def gini(attributions: TensorOrTuple) -> Tensor:
    r"""Gini coefficient of the absolute attributions of each example: how sparse its map is.

    That of :func:`captum_priors.penalties.gini`, example by example and with the other sign.

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.

    Returns:
        Shape ``(batch,)``, from 0 (all features matter equally, or none does) to
        :math:`1 - 1/p`; NaN where a map is not finite.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import gini
        >>> gini(torch.eye(4)).tolist()
        [0.75, 0.75, 0.75, 0.75]
    """
    rows = joined(tensors_of(attributions))
    each = torch.stack([-penalties.gini(row.unsqueeze(0)) for row in rows])
    return nan_where(each, rows)


def wrong_reason_rate(
    attributions: TensorOrTuple, annotation: TensorOrTuple, *, threshold: float | None = None
) -> Tensor:
    r"""Share of the forbidden features that the map says matter.

    .. math:: \frac{|\{i : M_i = 0,\; h_i > t\}|}{|\{i : M_i = 0\}|}, \qquad
        h = \frac{\phi^+ - \min \phi^+}{\max \phi^+ - \min \phi^+}

    (Friedrich et al. 2023, WR: positive attributions of each example scaled to [0, 1] and compared
    with their mean over the data set.)

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.
        annotation: :math:`M`, 1 where evidence may lie and 0 where it may not, that broadcasts to
            the attributions; or a tuple.
        threshold: :math:`t`; by default the mean of :math:`h` over the given examples.

    Returns:
        Shape ``(batch,)``, in [0, 1]; 0 for a map without positive attributions; NaN where nothing
        is forbidden or the map is not finite.

    Raises:
        ValueError: If the annotation does not fit or is not made of zeros and ones.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import wrong_reason_rate
        >>> phi, allowed = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[1, 0, 0]])
        >>> wrong_reason_rate(phi, allowed).item()
        0.5
    """
    tensors = tensors_of(attributions)
    masks = annotation if isinstance(annotation, tuple) else (annotation,)
    rows, allowed = joined(tensors), joined(_fitted(masks, tensors))
    positive = rows.clamp_min(0)
    low, high = positive.amin(1, keepdim=True), positive.amax(1, keepdim=True)
    # A constant positive map says that everything matters: it is one throughout, not 0 / 0.
    scaled = torch.where(
        high > low,
        (positive - low) / torch.where(high > low, high - low, 1),
        (high > 0).to(rows.dtype),
    )
    finite = rows.isfinite().all(1)
    level = float(scaled[finite].mean()) if threshold is None else threshold
    # What all maps share lies at the mean, and matters if anything does.
    on = (scaled > level) | ((scaled == 1) & (level >= 1))
    forbidden = allowed == 0
    # 0 / 0 where nothing is forbidden is NaN.
    return nan_where((on & forbidden).sum(1) / forbidden.sum(1).to(rows.dtype), rows)


def _fitted(masks: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    try:
        if len(masks) != len(tensors):
            raise RuntimeError("another number of tensors")
        fitted = tuple(
            torch.as_tensor(m, device=t.device).expand_as(t)
            for m, t in zip(masks, tensors, strict=True)
        )
    except RuntimeError as error:
        raise ValueError(
            expected_found(
                "`annotation`",
                f"masks that broadcast to {[tuple(t.shape) for t in tensors]}",
                str([tuple(torch.as_tensor(m).shape) for m in masks]),
                "Pass one mask for each tensor of attributions.",
            )
        ) from error
    if any(bool(((m != 0) & (m != 1)).any()) for m in fitted):
        raise ValueError(
            expected_found(
                "`annotation`", "zeros and ones", "other values", "Threshold it: (mask > 0.5)."
            )
        )
    return fitted
