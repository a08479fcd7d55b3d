"""Networks with little curvature: Softplus for ReLU, and weight decay for what it is meant for."""

from threading import get_ident
from typing import Any

from torch import nn

from captum_priors._checks import check_module, nonnegative, positive
from captum_priors.engine.modules import ReluMode


class smooth_activations(nn.Module):  # noqa: N801  # used like a function, as torch.no_grad is
    r"""Run a model with every ReLU replaced by Softplus, module or function, in place or not.

    .. math:: \mathrm{softplus}_\beta(x) = \tfrac1\beta \log(1 + e^{\beta x})

    tends to ReLU as :math:`\beta` grows and has curvature where ReLU has a kink, which bounds how
    far an explanation can be manipulated (Dombrowski et al. 2019, 2022). Use the result in place of
    the model, whose parameters it shares, or as a block in which whatever this thread runs is
    smoothed. ReLU inside TorchScript stays as it is, and so do max-pooling and other piecewise
    linear operations: the gradient still jumps where the largest entry of a window changes, and
    there no bound on its manipulation holds (:func:`manipulability_bound` refuses such models).
    Average-pooling is linear: take it where that matters.

    Args:
        model: The module to smooth.
        beta: Steepness :math:`\beta > 0`.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from captum_priors.stability import smooth_activations
        >>> model, x = torch.nn.Sequential(torch.nn.ReLU()), torch.randn(5)
        >>> torch.equal(smooth_activations(model, beta=10)(x), F.softplus(x, beta=10))
        True
        >>> with smooth_activations(model, beta=10):
        ...     inside = model(x)
        >>> torch.equal(inside, F.softplus(x, beta=10)), torch.equal(model(x), F.relu(x))
        (True, True)
    """

    def __init__(self, model: nn.Module, beta: float) -> None:
        super().__init__()
        check_module("model", model, "Pass the model; a prior smooths functions by smooth=beta.")
        self.model = model
        self.beta = positive("beta", beta)
        self._entered: dict[int, list[ReluMode]] = {}  # of each thread

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model smoothed."""
        with ReluMode(self.beta):
            return self.model(*args, **kwargs)

    def __enter__(self) -> nn.Module:
        """Smooth until the block ends; returns the model."""
        mode = ReluMode(self.beta)
        mode.__enter__()
        self._entered.setdefault(get_ident(), []).append(mode)
        return self.model

    def __exit__(self, *error: Any) -> None:
        """Put ReLU back."""
        self._entered[get_ident()].pop().__exit__(*error)

    def extra_repr(self) -> str:
        """Steepness for ``repr``."""
        return f"beta={self.beta!r}"


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    r"""Optimizer parameter groups in which only weight matrices and kernels decay.

    Smaller weights bound the curvature (:func:`manipulability_bound`; Dombrowski et al. 2022).
    Biases and normalisation layers do not occur in that bound, and decay harms them: parameters of
    norm layers, biases and all others with fewer than two dimensions are left alone. So are
    embedding tables, whose rows are inputs of the network rather than weights of it, unless a layer
    that decays shares them. Frozen parameters are left out.

    Args:
        model: The model.
        weight_decay: The optimizer's ``weight_decay`` for the first group.

    Returns:
        Two groups, decaying and not; either is left out if it is empty. Take an optimizer with
        decoupled decay: ``torch.optim.AdamW`` rather than ``Adam``.

    Example:
        >>> import torch
        >>> from captum_priors.stability import weight_decay_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        >>> groups = weight_decay_groups(model, 0.1)
        >>> [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups]
        [(0.1, [(4, 3)]), (0.0, [(4,), (4,), (4,)])]
        >>> _ = torch.optim.AdamW(groups, lr=1e-3)
    """
    check_module("model", model, "Pass the model itself.")
    weight_decay = nonnegative("weight_decay", weight_decay)
    # Other normalisation has one parameter for each channel, hence no matrix.
    spared = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
    decays: dict[nn.Parameter, bool] = {}  # each once, in order, however many modules share it
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                weight = parameter.dim() > 1 and "bias" not in name
                found = weight and not isinstance(module, spared)
                decays[parameter] = decays.get(parameter, False) or found
    groups = [
        {"params": [p for p in decays if decays[p] is decaying], "weight_decay": weight}
        for decaying, weight in ((True, weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]
