"""Activation sensitivity (after Fidel et al. 2020, Moshe et al. 2024)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_priors._checks import check_count
from captum_priors.engine import modules_of
from captum_priors._errors import expected_found, one_of
from captum_priors.priors.base import Reduction
from captum_priors.stability._regularizer import (
    Call,
    Regularizer,
    check_number,
    flat_rows,
    full_precision,
    repeated,
)

Layers = Literal["activations", "weights"] | Sequence[nn.Module | str]

_ACTIVATIONS = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus),
    *(F.hardtanh, F.hardswish, F.hardsigmoid, F.tanh, F.sigmoid, F.prelu, F.logsigmoid, F.softsign),
    *(F.relu_, F.leaky_relu_, F.elu_, F.celu_, F.selu_, F.hardtanh_, F.tanhshrink),
    *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.selu, torch.celu, torch.prelu),
    *(torch.tanh_, torch.sigmoid_, torch.selu_, torch.celu_),
    *(Tensor.relu, Tensor.relu_, Tensor.tanh, Tensor.tanh_, Tensor.sigmoid, Tensor.sigmoid_),
}
_WEIGHTS = (nn.Linear, nn.modules.conv._ConvNd)


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
    *Interpretation*, each an option: which layers, what norm, how the response is scaled, what
    noise and how large. None of the defaults is a value from the papers.

    Args:
        forward_func: The model.
        radius: Size of the noise in units of the inputs: standard deviation of ``"gaussian"``, half
            width of ``"uniform"``, magnitude of ``"sign"``.
        layers: ``"activations"``, the outputs of all activation functions, modules or not;
            ``"weights"``, the outputs of all linear and convolutional layers, which come before
            them; or modules or their names, whose outputs are taken.
        norm: :math:`q`, 1 or 2.
        scale: :math:`s`: ``"noise"``, the root mean square of :math:`\delta`; ``"activation"``,
            :math:`|a_{l,j}(x)|` plus the mean of these over the layer, a constant for gradients;
            or None, 1.
        noise: ``"gaussian"``, ``"uniform"`` or ``"sign"`` (each entry plus or minus the radius).
        n_samples: Perturbations for each call.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run the model with ReLU as Softplus of this steepness.

    Raises:
        TypeError: If ``layers`` holds something other than modules and names.
        ValueError: If an option is not one of those above, or the model has no such layers.

    Example:
        >>> import torch
        >>> from captum_priors.stability import ActivationSensitivity
        >>> layer = torch.nn.Linear(3, 2)
        >>> sensitivity = ActivationSensitivity(layer, layers=[layer], n_samples=20_000)
        >>> value = sensitivity(torch.randn(1, 3))
        >>> torch.allclose(value, layer.weight.square().sum() / 2, rtol=0.1)
        True
    """

    def __init__(
        self,
        forward_func: Any,
        radius: float = 0.1,
        *,
        layers: Layers = "activations",
        norm: Literal[1, 2] = 2,
        scale: Literal["noise", "activation"] | None = "noise",
        noise: Literal["gaussian", "uniform", "sign"] = "gaussian",
        n_samples: int = 1,
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(forward_func, reduction=reduction, smooth=smooth)
        self.radius = check_number("radius", radius)
        if norm not in (1, 2):
            raise ValueError(expected_found("`norm`", "1 or 2", repr(norm), "Pass norm=2."))
        if scale is not None:
            one_of("scale", scale, ("noise", "activation"))
        one_of("noise", noise, ("gaussian", "uniform", "sign"))
        check_count("n_samples", n_samples)
        self.norm, self.scale, self.noise, self.n_samples = norm, scale, noise, n_samples
        self.layers: Any = layers
        if isinstance(layers, str):
            one_of("layers", layers, ("activations", "weights"))
        # Past nn.Module's registration, as the model.
        self.__dict__["_modules_seen"] = _found_layers(forward_func, layers)

    _modules_seen: tuple[nn.Module, ...]

    def _scores(self, call: Call) -> Tensor:
        times = 1 + self.n_samples
        deltas = tuple(self._draw(x) for x in repeated(call.inputs, self.n_samples))
        points = tuple(
            torch.cat([x, y + d])
            for x, y, d in zip(
                call.inputs, repeated(call.inputs, self.n_samples), deltas, strict=True
            )
        )
        with self._recording() as seen:
            call.outputs(points)
        if not seen:
            raise ValueError(
                expected_found(
                    "`layers`",
                    "layers or activation functions that run",
                    f"none in {type(self.forward_func).__name__}",
                    "Pass layers=[...], the modules whose outputs count.",
                )
            )
        spread = flat_rows(deltas).square().mean(1).sqrt().reshape(self.n_samples, call.n, 1)
        terms = [self._term(a, call.n * times, call.n, spread) for a in seen]
        return torch.stack(terms).mean(0)

    def _term(self, activation: Tensor, rows: int, n: int, spread: Tensor) -> Tensor:
        """Mean response of the neurons of one layer, for each example."""
        if activation.dim() == 0 or activation.shape[0] % rows:
            raise ValueError(
                expected_found(
                    "`layers`",
                    f"outputs whose first dimension holds the {rows} examples of a pass",
                    f"shape {tuple(activation.shape)}",
                    "Pass layers=[...] that keep the batch first.",
                )
            )
        values = full_precision(activation).reshape(1 + self.n_samples, n, -1)
        clean, noisy = values[:1], values[1:]
        response = (noisy - clean).abs()
        if self.scale == "noise":
            response = response / torch.where(spread > 0, spread, 1)
        elif self.scale == "activation":
            size = clean.detach().abs()
            size = size + size.mean(2, keepdim=True)
            response = response / torch.where(size > 0, size, 1)
        return (response if self.norm == 1 else response.square()).mean((0, 2))

    def _draw(self, like: Tensor) -> Tensor:
        like = like.detach()
        if self.noise == "uniform":
            return (2 * torch.rand_like(like) - 1) * self.radius
        draw = torch.randn_like(like)
        return (draw if self.noise == "gaussian" else _signs(draw)) * self.radius

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):
                seen.append(first.clone())  # the model may go on in place

        with ExitStack() as stack:
            if isinstance(self.layers, str) and self.layers == "activations":
                stack.enter_context(_RecordActivations(seen))
            for module in self._modules_seen:
                stack.callback(module.register_forward_hook(record).remove)
            yield seen

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"radius": self.radius}
        if isinstance(self.layers, str) and self.layers != "activations":
            options["layers"] = self.layers
        usual = {"norm": 2, "scale": "noise", "noise": "gaussian", "n_samples": 1}
        given = {name: getattr(self, name) for name in usual}
        return options | {k: value for k, value in given.items() if value != usual[k]}


class _RecordActivations(TorchFunctionMode):
    """Keeps what activation functions return, called by a module or not."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _ACTIVATIONS:
            self.seen.append(output.clone())
        return output


def _signs(draw: Tensor) -> Tensor:
    return torch.where(draw >= 0, 1.0, -1.0).to(draw.dtype)


def _found_layers(forward_func: Any, layers: Any) -> tuple[nn.Module, ...]:
    """Modules whose outputs are recorded."""
    roots = modules_of(forward_func)
    if isinstance(layers, str):
        if layers == "activations":
            return ()
        found = [m for root in roots for m in root.modules() if isinstance(m, _WEIGHTS)]
        if not found:
            raise ValueError(
                expected_found(
                    "`layers`",
                    "linear or convolutional layers in the model",
                    "none",
                    "Pass layers=[...], the modules whose outputs count.",
                )
            )
        return tuple(dict.fromkeys(found))
    named = {name: module for root in roots for name, module in root.named_modules()}
    chosen = []
    for layer in layers if isinstance(layers, (list, tuple)) else (layers,):
        module = named.get(layer) if isinstance(layer, str) else layer
        if not isinstance(module, nn.Module):
            raise (ValueError if isinstance(layer, str) else TypeError)(
                expected_found(
                    "`layers`",
                    "'activations', 'weights', or modules of the model or their names",
                    repr(layer),
                    "See model.named_modules().",
                )
            )
        chosen.append(module)
    if not chosen:
        raise ValueError(
            expected_found("`layers`", "at least one module", "none", "Pass 'activations'.")
        )
    return tuple(chosen)
