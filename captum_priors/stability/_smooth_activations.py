"""Softplus in place of ReLU (Dombrowski et al. 2019, 2022)."""

from typing import Any

from torch import nn

from captum_priors._checks import positive
from captum_priors._errors import expected_found
from captum_priors.engine.model import ReluMode


class smooth_activations(nn.Module):  # noqa: N801  # used like a function, as torch.no_grad is
    r"""Run a model with every ReLU replaced by Softplus, module or function, in place or not.

    .. math:: \mathrm{softplus}_\beta(x) = \tfrac1\beta \log(1 + e^{\beta x})

    tends to ReLU as :math:`\beta` grows and has curvature where ReLU has a kink, which bounds how
    far an explanation can be manipulated (Dombrowski et al. 2019, 2022).
    Use the result in place of the model, whose parameters it shares, or as a context in which
    everything runs smoothed in this thread. ReLU inside TorchScript stays as it is, and so do max-pooling
    and other piecewise linear operations: the gradient still jumps where the largest entry of a
    window changes, and there no bound on its manipulation holds (:func:`manipulability_bound`
    refuses such models). Average-pooling is linear: take it where that matters.

    Args:
        model: The module to smooth.
        beta: Steepness :math:`\beta > 0`.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If ``beta`` is not positive and finite.

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
        if not isinstance(model, nn.Module):
            raise TypeError(
                expected_found(
                    "`model`",
                    "a torch.nn.Module",
                    type(model).__name__,
                    "Pass the model; a prior smooths any function with smooth=beta.",
                )
            )
        self.model = model
        self.beta = positive("beta", beta)
        self._entered: list[ReluMode] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model smoothed."""
        with ReluMode(self.beta):
            return self.model(*args, **kwargs)

    def __enter__(self) -> nn.Module:
        """Smooth until the block ends; returns the model."""
        self._entered.append(ReluMode(self.beta))
        self._entered[-1].__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        """Put ReLU back."""
        self._entered.pop().__exit__(*error)

    def extra_repr(self) -> str:
        """Steepness for ``repr``."""
        return f"beta={self.beta:g}"
