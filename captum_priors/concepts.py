"""Concept vectors: the direction in which a layer's activations change with a concept.

:func:`fit` finds one from activations with and without the concept, :func:`from_captum` takes what
:class:`captum.concept.TCAV` has found. :class:`captum_priors.priors.ConceptPrior` trains on them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._checks import positive
from captum_priors._errors import one_of, refusal, type_of

__all__ = ["fit", "from_captum"]

Method = Literal["difference", "ridge", "logistic"]


def fit(
    activations: Tensor,
    labels: Tensor,
    method: Method = "difference",
    *,
    alpha: float = 1.0,
    channel_dim: int = 1,
) -> Tensor:
    r"""Return the unit vector along which activations with a concept differ from those without.

    - ``"difference"``: of the two means. For two classes this is the pattern of the concept, a
      regression of the activations on the label (Pahde et al. 2025), rather than a filter that
      tells it best and also cancels what else varies.
    - ``"ridge"``: the weights of :math:`\min_{w,b} \sum_i (w^\top a_i + b - y_i)^2 + \alpha\lVert
      w\rVert^2` with labels :math:`y = \pm 1`.
    - ``"logistic"``: of :math:`\min_{w,b} \sum_i \log(1 + e^{-y_i (w^\top a_i + b)}) +
      \tfrac\alpha2 \lVert w\rVert^2`.

    Maps are averaged over places first, which leaves one number for each channel (the code of
    Dreyer et al. 2024 takes this or the largest). For a concept that lies at some place, flatten
    them: ``fit(a.flatten(1), labels)``. :class:`captum.attr.LayerActivation` gives activations.

    Args:
        activations: Shape ``(examples, features)``, or maps ``(examples, channels, ...)``.
        labels: Whether each example has the concept: truth values, or zeros and ones.
        method: One of those above.
        alpha: Weight of the squared norm; ``"difference"`` has none.
        channel_dim: The axis of the channels of a map: 1, or -1 for tokens.

    Returns:
        Shape ``(features,)`` or ``(channels,)``, in the dtype of the activations; in float32 for
        those of whole numbers.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If there are not examples of both kinds, or nothing tells them apart.

    Example:
        >>> import torch
        >>> from captum_priors.concepts import fit
        >>> a, labels = torch.randn(50, 4), torch.arange(50) % 2
        >>> a[labels == 1, 2] += 100.0
        >>> bool(fit(a, labels)[2] > 0.99)
        True
    """
    one_of("method", method, get_args(Method))
    positive("alpha", alpha)
    present = _presence(activations, labels)
    rows = activations.detach().double()
    rows = over_places(rows, channel_dim) if rows.dim() > 2 else rows
    centred = rows - rows.mean(0)
    vector = _METHODS[method](centred, present, alpha)
    length = vector.norm()
    if not bool(length > 1e-12 * centred.abs().amax()):  # negated so that NaN counts
        raise refusal(
            ValueError,
            "`activations`",
            "finite ones, whose mean changes with the label",
            "a direction of length " + f"{float(length):.2g}",
            "Take another layer; flatten maps whose mean over places does not tell.",
        )
    direction: Tensor = vector / length
    return direction.to(activations.dtype if activations.is_floating_point() else torch.float32)


def from_captum(cavs: Any, layer: str, concept: Any) -> Tensor:
    """Return a concept's vector from Captum's ``TCAV``, or one ``CAV``, as a flat unit vector.

    Captum flattens activations, so the vector has a number for each entry of one;
    :class:`captum_priors.priors.ConceptPrior` takes it as it is.

    Args:
        cavs: A :class:`captum.concept.TCAV` after ``compute_cavs`` or ``interpret``, what
            ``compute_cavs`` returned, or a :class:`captum.concept.CAV`.
        layer: The layer's name.
        concept: The :class:`captum.concept.Concept`.

    Returns:
        Shape ``(features,)``.

    Raises:
        ValueError: If not exactly one of the vectors is this concept's.

    Example:
        >>> import torch
        >>> from captum.concept import CAV, Concept
        >>> from captum_priors.concepts import from_captum
        >>> dots, noise = Concept(0, "dots", None), Concept(1, "noise", None)
        >>> weights = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
        >>> cav = CAV([dots, noise], "conv", {"weights": weights, "classes": [0, 1]})
        >>> torch.equal(from_captum(cav, "conv", dots), torch.tensor([0.6, 0.8]))
        True
    """
    found = getattr(cavs, "cavs", cavs)
    each = [of.get(layer) for of in found.values()] if isinstance(found, Mapping) else [found]
    known = [cav for cav in each if getattr(cav, "stats", None) and cav.layer == layer]
    rows = []
    for cav in known:
        classes = torch.as_tensor(cav.stats["classes"]).tolist()
        if concept.id in classes:
            rows.append(torch.as_tensor(cav.stats["weights"])[classes.index(concept.id)])
    if len(rows) != 1:
        raise refusal(
            ValueError,
            "`cavs`",
            f"one vector of {concept} at layer {layer!r}",
            f"{len(rows)}; at this layer there are {[cav.concepts for cav in known]}",
            "Call compute_cavs first, and pass a single CAV where the concept is in several.",
        )
    vector = rows[0].detach().flatten()
    direction: Tensor = vector / vector.norm()
    return direction


def over_places(maps: Tensor, channel_dim: int) -> Tensor:
    """Average over all axes but the first and that of the channels: ``(examples, channels)``."""
    means: Tensor = maps.movedim(channel_dim, 1).flatten(2).mean(2)
    return means


def _presence(activations: Any, labels: Any) -> Tensor:
    """Check what is fitted on, and return who has the concept."""
    for name, value in (("activations", activations), ("labels", labels)):
        if not isinstance(value, Tensor):
            remedy = "Convert it with torch.as_tensor(...)."
            raise refusal(TypeError, f"`{name}`", "a torch.Tensor", type_of(value), remedy)
    present: Tensor = labels.bool()
    fit_together = activations.dim() > 1 and labels.shape == activations.shape[:1]
    if not (fit_together and present.any()) or present.all() or bool((labels != present).any()):
        raise refusal(
            ValueError,
            "`labels`",
            "a zero or a one for each row of the activations, some of each",
            f"{labels.unique().tolist()[:5]} of shape {tuple(labels.shape)}, for activations of "
            f"shape {tuple(activations.shape)}",
            "Stack the activations of all examples, and mark those with the concept by 1.",
        )
    return present


def _difference(centred: Tensor, present: Tensor, alpha: float) -> Tensor:
    return centred[present].mean(0) - centred[~present].mean(0)


def _ridge(centred: Tensor, present: Tensor, alpha: float) -> Tensor:
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    signs = 2 * present.to(centred.dtype) - 1
    weights: Tensor = v.T @ (s / (s.square() + alpha) * (u.T @ signs))  # u is centred
    return weights


def _logistic(centred: Tensor, present: Tensor, alpha: float) -> Tensor:
    signs = 2 * present.to(centred.dtype) - 1
    with torch.inference_mode(False), torch.enable_grad():
        centred, signs = centred.clone(), signs.clone()  # those of inference mode have no graph
        weights = centred.new_zeros(centred.shape[1] + 1).requires_grad_()
        search = torch.optim.LBFGS(
            [weights],
            max_iter=1000,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            search.zero_grad()
            margins = signs * (centred @ weights[:-1] + weights[-1])
            value = F.softplus(-margins).sum() + alpha / 2 * weights[:-1].square().sum()
            value.backward()
            return value

        search.step(loss)
    return weights.detach()[:-1]


_METHODS: dict[Method, Callable[[Tensor, Tensor, float], Tensor]] = {
    "difference": _difference,
    "ridge": _ridge,
    "logistic": _logistic,
}
