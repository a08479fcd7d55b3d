"""Weight decay for what it is meant for."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from captum_priors._errors import expected_found
from captum_priors.stability._regularizer import check_number

_NORMS: tuple[type, ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm) + (
    (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def weight_decay_groups(
    model: nn.Module, weight_decay: float, *, embeddings: bool = False
) -> list[dict[str, Any]]:
    r"""Optimizer parameter groups in which only weight matrices and kernels decay.

    Smaller weights bound the curvature (:func:`manipulability_bound`; Dombrowski et al. 2022),
    :math:`\lVert\nabla^2 f\rVert \le \frac\beta4 \sum_l \prod_{k \le l} \lVert W_k\rVert^2
    \prod_{k > l} \lVert W_k\rVert`. Biases and normalisation layers do not occur in it, and decay
    harms them: parameters of norm layers, biases and all others with fewer than two dimensions are
    left alone. So are embedding tables, whose rows are inputs of the network rather than weights of
    it, unless a layer that decays shares them. Frozen parameters are left out.

    Args:
        model: The model.
        weight_decay: The optimizer's ``weight_decay`` for the first group.
        embeddings: Whether embedding tables decay, too.

    Returns:
        Two groups, decaying and not; either is left out if it is empty. Take an optimizer with
        decoupled decay: ``torch.optim.AdamW`` rather than ``Adam``.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If ``weight_decay`` is negative, or no parameter can be trained.

    Example:
        >>> import torch
        >>> from captum_priors.stability import weight_decay_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        >>> groups = weight_decay_groups(model, 0.1)
        >>> [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups]
        [(0.1, [(4, 3)]), (0.0, [(4,), (4,), (4,)])]
        >>> _ = torch.optim.AdamW(groups, lr=1e-3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            expected_found(
                "`model`", "a torch.nn.Module", type(model).__name__, "Pass the model itself."
            )
        )
    weight_decay = check_number("weight_decay", weight_decay, zero=True)
    owned = [
        (parameter, _decays(module, name, parameter, embeddings))
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    if not owned:
        raise ValueError(
            expected_found(
                "`model`", "parameters to train", "none that requires a gradient", "Unfreeze some."
            )
        )
    decaying = {id(parameter) for parameter, decays in owned if decays}
    each = {id(parameter): parameter for parameter, _ in owned}  # shared ones once, in order
    groups: list[dict[str, Any]] = [
        {"params": [p for i, p in each.items() if i in decaying], "weight_decay": weight_decay},
        {"params": [p for i, p in each.items() if i not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decays(module: nn.Module, name: str, parameter: nn.Parameter, embeddings: bool) -> bool:
    if isinstance(module, _NORMS) or parameter.dim() < 2 or "bias" in name:
        return False
    return embeddings or not isinstance(module, _EMBEDDINGS)
