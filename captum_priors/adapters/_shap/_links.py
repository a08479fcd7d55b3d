"""SHAP's link functions on tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_priors._errors import NotDifferentiableError, expected_found

Link = Callable[[Tensor], Tensor]

# As SHAP: KernelExplainer clips probabilities here, the masked-model explainers do not.
_CLIP = 1e-15
# As SHAP: step of the forward difference that linearises the link.
_STEP = 1e-4


def identity(values: Tensor) -> Tensor:
    """Return the values."""
    return values


def clipped_logit(values: Tensor) -> Tensor:
    """Return log-odds of probabilities that are kept off 0 and 1."""
    return torch.logit(values.clamp(_CLIP, 1 - _CLIP))


def name_of(link: Any) -> str:
    """Name a link, a function or one of KernelExplainer's objects; saved ones are copies."""
    return str(getattr(link, "__name__", link))


def torch_link(link: Any, *, clipped: bool = False) -> Link:
    """Return a link as a function of tensors."""
    logit = clipped_logit if clipped else torch.logit
    known: dict[str, Link] = {"identity": identity, "logit": logit}
    name = name_of(link)
    if name not in known:
        raise NotDifferentiableError(
            expected_found(
                "`link`",
                "shap.links.identity or shap.links.logit",
                name,
                "Make the link the last step of the model and explain with the identity.",
            )
        )
    return known[name]


def linearising_weights(background: Tensor, link: Link) -> Tensor:
    r"""Weights :math:`w_r` of the background rows with mean(w link(p)) = link(mean(p)).

    Of least norm for the link's linearisation at the mean, with SHAP's forward difference as its
    slope.
    """
    mean = background.mean(0)
    centre = link(mean)
    slope = (link(mean + _STEP) - centre) / _STEP
    weights = slope * (background - mean) / (link(background) - centre)
    normalised: Tensor = weights * (weights.shape[0] / weights.sum(0))
    return normalised
