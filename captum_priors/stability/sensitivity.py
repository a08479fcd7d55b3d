"""Activation sensitivity (after Fidel et al. 2020, Moshe et al. 2024)."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from captum_priors._checks import count, positive
from captum_priors._errors import one_of, refusal
from captum_priors.engine import modules_of
from captum_priors.priors.base import Call
from captum_priors.priors.terms import TermOptions
from captum_priors.stability.base import Regularizer, flat_rows, repeated
from captum_priors.stability.hessian import rademacher

Layers = Literal["weights"] | Sequence[nn.Module | str]
Power = Literal[1, 2]
Scale = Literal["noise", "activation", None]
Noise = Literal["gaussian", "uniform", "sign"]

_WEIGHTS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class ActivationSensitivity(Regularizer):
    r"""Penalise how much each neuron responds to small perturbations of the input.

    .. math:: \frac{1}{|\mathcal L|} \sum_{l \in \mathcal L} \frac{1}{N_l}
        \sum_{j=1}^{N_l} \mathbb E_\delta \left|
        \frac{a_{l,j}(x + \delta) - a_{l,j}(x)}{s}\right|^q

    over layers with :math:`N_l` neurons :math:`a_{l,j}`. Only first derivatives are taken.
    For :math:`q = 2` and small Gaussian noise of standard deviation :math:`\sigma`, the term of a
    layer tends to :math:`\tfrac{1}{N_l} \lVert\partial a_l/\partial x\rVert_F^2` with
    ``scale="noise"``, and to :math:`\sigma^2` times that with ``scale=None``.

    *From the papers* (their abstracts; their code is not public): a stochastic term that
    decreases the sensitivity of individual neurons to small input perturbations, drawn anew at each
    step, beside Jacobian regularization (:class:`JacobianRegularization`; add it).
    *Interpretation*, each an option: which layers, what power, how the response is scaled, what
    noise and how large. None of the defaults is a value from the papers.

    Layers are modules, seen as the forward pass calls them; one that is called twice counts twice.
    An activation that is a function in ``forward`` (``F.relu``) is no module: take the layer before
    it, as ``"weights"`` does, or the module whose output it is.

    Args:
        forward_func: The model.
        radius: Size of the noise in units of the inputs: standard deviation of ``"gaussian"``, half
            width of ``"uniform"``, magnitude of ``"sign"``.
        layers: ``"weights"``, the outputs of all linear and convolutional layers; or modules or
            their names, whose outputs are taken.
        power: :math:`q`, 1 or 2.
        scale: :math:`s`: ``"noise"``, the root mean square of :math:`\delta`; ``"activation"``,
            :math:`|a_{l,j}(x)|` plus the mean of these over the layer, a constant for gradients;
            or None, 1.
        noise: ``"gaussian"``, ``"uniform"`` or ``"sign"`` (each entry plus or minus the radius).
        n_samples: Perturbations for each call.
        options: ``reduction``, ``smooth``, ``batch_norm``, ``name`` of :class:`Term`.

    Raises:
        ValueError: If the forward pass calls no such layer.

    Example:
        >>> import torch
        >>> from captum_priors.stability import ActivationSensitivity
        >>> layer = torch.nn.Linear(3, 2)
        >>> value = ActivationSensitivity(layer, n_samples=20_000)(torch.randn(1, 3))
        >>> torch.allclose(value, layer.weight.square().sum() / 2, rtol=0.1)
        True
    """

    _chosen: list[nn.Module]

    def __init__(
        self,
        forward_func: Any,
        radius: float = 0.1,
        *,
        layers: Layers = "weights",
        power: Power = 2,
        scale: Scale = "noise",
        noise: Noise = "gaussian",
        n_samples: int = 1,
        **options: Unpack[TermOptions],
    ) -> None:
        super().__init__(forward_func, **options)
        one_of("power", power, get_args(Power))
        one_of("scale", scale, get_args(Scale))
        one_of("noise", noise, get_args(Noise))
        self.radius, self.n_samples = positive("radius", radius), count("n_samples", n_samples)
        self.power, self.scale, self.noise = power, scale, noise
        self.layers, chosen = _chosen_layers(layers, modules_of(forward_func))
        self.__dict__["_chosen"] = chosen  # past nn.Module's registration, as the model

    def _scores(self, call: Call) -> Tensor:
        call.refuse_coupled()  # before the hooks, which would see it run
        deltas = tuple(map(self._draw, repeated(call.inputs, self.n_samples)))
        points = tuple(
            torch.cat([x, *(x + d for d in delta.chunk(self.n_samples))])
            for x, delta in zip(call.inputs, deltas, strict=True)
        )
        seen = self._seen(call, points)
        spread = flat_rows(deltas).square().mean(1).sqrt().reshape(self.n_samples, call.n, 1)
        return torch.stack([self._term(a, call.n, spread) for a in seen]).mean(0)

    def _seen(self, call: Call, points: tuple[Tensor, ...]) -> list[Tensor]:
        """What the layers return."""
        seen: list[tuple[nn.Module, Tensor]] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            seen.append((module, first.clone()))  # the model may go on in place

        with ExitStack() as stack:
            for module in self._chosen:
                stack.callback(module.register_forward_hook(record).remove)
            call.outputs(points)
        ran = {module for module, _ in seen}
        silent = [module for module in self._chosen if module not in ran]
        if not seen or (silent and self.layers != "weights"):
            raise refusal(
                ValueError,
                "`layers`",
                "modules that the forward pass calls",
                f"that it does not call {', '.join(type(m).__name__ for m in silent) or 'any'}",
                "Pass layers=[...], modules whose outputs count and that run.",
            )
        return [output for _, output in seen]

    def _term(self, activation: Tensor, n: int, spread: Tensor) -> Tensor:
        """Mean response of the neurons of one layer, for each example."""
        rows = (1 + self.n_samples) * n
        if activation.dim() == 0 or len(activation) % rows:
            raise refusal(
                ValueError,
                "`layers`",
                f"outputs whose first dimension holds the {rows} examples of a pass",
                f"shape {tuple(activation.shape)}",
                "Pass layers=[...] that keep the batch first.",
            )
        values = flat_rows((activation,)).reshape(1 + self.n_samples, n, -1)
        clean, noisy = values[:1], values[1:]
        response = (noisy - clean).abs()
        if self.scale == "noise":
            response = response / torch.where(spread > 0, spread, 1)
        elif self.scale == "activation":
            size = clean.detach().abs()
            size = size + size.mean(2, keepdim=True)
            response = response / torch.where(size > 0, size, 1)
        return response.pow(self.power).mean((0, 2))

    def _draw(self, like: Tensor) -> Tensor:
        if self.noise == "gaussian":
            return torch.randn_like(like) * self.radius
        if self.noise == "uniform":
            return (2 * torch.rand_like(like) - 1) * self.radius
        return rademacher((like,))[0] * self.radius


def _chosen_layers(layers: Any, roots: Sequence[nn.Module]) -> tuple[Any, list[nn.Module]]:
    """What to show as ``layers``, by name where the model has one, and the modules themselves."""
    names = {module: name for root in roots for name, module in root.named_modules()}
    if layers == "weights":
        return layers, [module for module in names if isinstance(module, _WEIGHTS)]
    modules = {name: module for module, name in names.items()}
    chosen = [modules.get(layer, layer) if isinstance(layer, str) else layer for layer in layers]
    for layer in chosen:
        if not isinstance(layer, nn.Module):
            raise refusal(
                ValueError,
                "`layers`",
                "'weights', or a list of modules of the model or their names",
                repr(layer),
                "See model.named_modules().",
            )
    return [names.get(module, module) for module in chosen], list(dict.fromkeys(chosen))
