"""What a person says about the features: one rule for it, and the penalties that take it."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._errors import one_of, refusal
from captum_priors._rows import shared
from captum_priors.penalties.maths import (
    cosine_distance,
    in_units_of_largest,
    lift_penalty,
)

Values = Literal["mask", "binary", "finite"]
Kind = Literal["bce", "kl", "l1", "huber", "order"]
_VALUES: dict[Values, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "mask": (
        lambda a: (a >= 0) & (a <= 1),
        "values from 0 (evidence may not lie here) to 1 (it may)",
        "Scale the mask to [0, 1]. Give a place that is not known a value; priors take an example "
        "of which nothing is known, all NaN, with missing='nan'.",
    ),
    "binary": (lambda a: (a == 0) | (a == 1), "zeros and ones", "Threshold it: (mask > 0.5)."),
    "finite": (
        torch.isfinite,
        "finite numbers",
        "Give a place that is not known a value, for example 0; priors take an example of which "
        "nothing is known, all NaN, with missing='nan'.",
    ),
}


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
    mask = fitted(attributions, annotation, "mask")
    return ((1 - mask) * attributions).flatten(1).square().sum(1)


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
    mask = fitted(attributions, annotation, "mask")
    evidence = _evidence(attributions, mask)
    positive = in_units_of_largest(evidence.relu().flatten(1), 1)
    return (positive * (1 - mask).flatten(1)).sum(1) / positive.sum(1).clamp_min(1)


@lift_penalty
def background(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    r"""Minus the logarithm of what is left when the share of the background is taken away.

    .. math:: -\log\left(1 - \frac{\sum_i (1 - M_i)\, |\phi_i|}{\sum_i |\phi_i|}\right)

    (Bassi et al. 2024, ISNet, which takes it of relevance: :class:`captum_priors.AttnLRP`.)
    Unlike the share itself it does not stop to matter where nearly all lies outside.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        annotation: :math:`M` as in :func:`outside`.

    Returns:
        Shape ``(batch,)``, at least 0, and finite: the share is divided by 1 plus the precision
        of the dtype. 0 where all attributions are zero.

    Raises:
        ValueError: If the annotation does not fit, or leaves [0, 1].

    Example:
        >>> import torch
        >>> from captum_priors.penalties import background
        >>> phi, allowed = torch.tensor([[3.0, -1.0]]), torch.tensor([[1, 0]])
        >>> torch.allclose(background(phi, annotation=allowed), torch.tensor(4 / 3).log())
        True
    """
    mask = fitted(attributions, annotation, "mask")
    size = in_units_of_largest(attributions.abs().flatten(1), 1)
    share = (size * (1 - mask).expand_as(attributions).flatten(1)).sum(1) / size.sum(1).clamp_min(1)
    return -torch.log1p(-share / (1 + torch.finfo(share.dtype).eps))


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
    given = fitted(attributions, annotation, "finite").expand_as(attributions)
    if measure == "mse":
        return (attributions - given).square().flatten(1).mean(1)
    return cosine_distance(attributions.flatten(1), given.flatten(1))


@lift_penalty
def rationale(attributions: Tensor, *, annotation: Tensor, kind: Kind = "l1") -> Tensor:
    r"""Distance of the evidence from an annotated rationale, as shares of their sums.

    With :math:`q_i = |\phi_i| / \sum_j |\phi_j|` and :math:`m_i = M_i / S`, :math:`S = \sum_j M_j`,

    =========== ==================================================================================
    ``"bce"``   :math:`\sum_i m_i \log\frac{m_i}{q_i} + (1 - m_i) \log\frac{1 - m_i}{1 - q_i}`
    ``"kl"``    :math:`\sum_i m_i \log (m_i / q_i)`
    ``"l1"``    :math:`\tfrac1S \sum_i |S q_i - M_i|`, the sum of :math:`|q_i - m_i|`
    ``"huber"`` the same with Huber's loss, squares up to a difference of 1
    ``"order"`` :math:`\tfrac1S \sum_i M_i \min(|\phi_i| / b - 1, 0)^2`, with
                :math:`b = \max_j (1 - M_j) |\phi_j|`
    =========== ==================================================================================

    (Joshi et al. 2022, ER-Test, and Chan et al. 2022, UNIREX; Huang et al. 2021 for the order,
    which is content where the rationale outranks all else.) They compare attributions themselves
    with zeros and ones, which rewards scaling them; these ignore scale, and padding that has no
    attribution. Binary cross entropy is here less its least value, that of the rationale.

    What shares one value of the annotation is summed first, with its signs: an embedding's numbers,
    where the annotation is ``(batch, words, 1)``, or channels. Evidence against the target counts
    as evidence; pass attributions through ``relu`` if it should not.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        annotation: :math:`M`, 1 where the rationale is and 0 elsewhere, as in :func:`outside`.
        kind: One of those above. Logarithms punish each word of a rationale that has no evidence,
            which flat evidence avoids most cheaply: see the benchmark ``rationales``.

    Returns:
        Shape ``(batch,)``, at least 0; 0 where there is no attribution or no rationale. Logarithms
        are finite: shares are at least the precision of the dtype.

    Raises:
        ValueError: If the annotation does not fit, or leaves [0, 1].

    Example:
        >>> import torch
        >>> from captum_priors.penalties import rationale
        >>> phi, words = torch.tensor([[3.0, -1.0, 0.0]]), torch.tensor([[1, 0, 0]])
        >>> rationale(phi, annotation=words, kind="l1").item()  # 1/4 is missing, 1/4 too much
        0.5
        >>> rationale(phi, annotation=words, kind="order").item()
        0.0
    """
    one_of("kind", kind, get_args(Kind))
    mask = fitted(attributions, annotation, "mask")
    size = in_units_of_largest(_evidence(attributions, mask).abs().flatten(1), 1)
    mask = mask.expand(len(size), *mask.shape[1:]).flatten(1)
    total, places = size.sum(1), mask.sum(1)
    wanted = torch.where(places > 0, places, 1)
    q, m = size / total.clamp_min(1).unsqueeze(1), mask / wanted.unsqueeze(1)
    eps = torch.finfo(q.dtype).eps
    if kind in ("bce", "kl"):
        found = (torch.xlogy(m, m) - torch.xlogy(m, q + eps)).sum(1)
        if kind == "bce":
            without = torch.log1p(-q / (1 + eps))
            found = found + (torch.xlogy(1 - m, 1 - m) - (1 - m) * without).sum(1)
    elif kind == "order":
        most = ((1 - mask) * size).amax(1, keepdim=True)
        outranked = ~(most <= torch.finfo(q.dtype).tiny ** 0.5)  # negated so that NaN counts
        less = (size - most).clamp_max(0) / torch.where(outranked, most, 1)
        found = (mask * less.square()).sum(1) / wanted
    else:
        scaled = q * wanted.unsqueeze(1)
        distance = F.l1_loss if kind == "l1" else F.huber_loss
        found = distance(scaled, mask, reduction="none").sum(1) / wanted
    return torch.where((total == 0) | (places == 0), 0, found)


def _evidence(attributions: Tensor, mask: Tensor) -> Tensor:
    """Sum what shares one value of the mask."""
    together = [d for d in range(1, mask.dim()) if mask.shape[d] == 1]
    return attributions.sum(together, keepdim=True) if together else attributions


def fitted(attributions: Tensor, annotation: Any, values: Values) -> Tensor:
    """Give an annotation the attributions' dimensions and dtype, so that the two broadcast.

    The rule is that of :mod:`captum_priors.penalties`.
    """
    given = _checked(attributions, annotation, values)
    shape = attributions.shape
    n = 1 if isinstance(annotation, shared) else len(attributions)
    sizes = [(n,), *((1, size) for size in shape[1:])]
    if given.dim() != len(shape) or any(
        size not in fitting for size, fitting in zip(given.shape, sizes, strict=True)
    ):
        found = annotation.value if isinstance(annotation, shared) else annotation
        without = f", or {(shape[0], *shape[2:])} for all channels" if len(shape) > 3 else ""
        raise refusal(
            ValueError,
            "`annotation`",
            f"one for each of the {len(attributions)} examples, shape {tuple(shape)}{without}",
            str(tuple(found.shape)),
            "Wrap what is one for the whole batch, captum_priors.shared(...); unsqueeze what "
            "channels or places share; or resize the annotation.",
        )
    return given.to(attributions.dtype)


def resized(attributions: Tensor, annotation: Any, values: Values) -> Tensor:
    """Average an annotation of images down to the size of maps ``(batch, channels, h, w)``.

    Over the channels, too, where the maps have one for all of them.
    """
    given = _checked(attributions, annotation, values)
    if isinstance(annotation, shared):
        given = given.expand(len(attributions), *given.shape[1:])
    size = attributions.shape[2:]
    if given.dim() == attributions.dim() == 4 and attributions.shape[1] == 1 < given.shape[1]:
        given = given.to(attributions.dtype).mean(1, keepdim=True)
    if given.dim() == attributions.dim() == 4 and given.shape[2:] != size:
        given = F.adaptive_avg_pool2d(given.to(attributions.dtype), (size[0], size[1]))
    return fitted(attributions, given, values)


def rows_of_nan(annotation: Any) -> Tensor | None:
    """Which examples have no number in their annotation, ``(batch,)``; None where it has no NaN.

    Of a tuple, which have none in any of its tensors. What is shared is known for all.
    """
    each = annotation if isinstance(annotation, tuple) else (annotation,)
    given = [a for a in each if isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 0]
    if not given or any(isinstance(a, shared) for a in each):
        return None
    return torch.stack([a.flatten(1).isnan().all(1) for a in given]).all(0)


def _checked(attributions: Tensor, annotation: Any, values: Values) -> Tensor:
    """Check type, device and values; add the dimensions that may be left out."""
    given = annotation.value if isinstance(annotation, shared) else annotation
    if not isinstance(given, Tensor):
        raise refusal(
            TypeError, "`annotation`", "a tensor", type(given).__name__, "Use torch.as_tensor."
        )
    if given.device != attributions.device:
        raise refusal(
            ValueError,
            "`annotation`",
            f"device {attributions.device} as for the attributions",
            str(given.device),
            f"Move it with .to({str(attributions.device)!r}).",
        )
    are_good, expected, remedy = _VALUES[values]
    bad = ~are_good(given)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        found = f"annotation{place} = {given[tuple(place)].item():g}"
        raise refusal(ValueError, "`annotation`", expected, found, remedy)
    if isinstance(annotation, shared):
        given = given.unsqueeze(0)
    return given.unsqueeze(1) if given.dim() == attributions.dim() - 1 >= 3 else given
