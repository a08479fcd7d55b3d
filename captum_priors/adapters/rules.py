"""DeepLIFT and guided backpropagation: methods with rules for the modules of a network.

What they leave on the modules is taken off again, and a network that their rules do not cover is
warned about: there Captum's numbers, and therefore ours, are incomplete.
"""

from collections.abc import Callable
from functools import partialmethod
from typing import Any, ClassVar

import captum.attr as ca
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._captum import RESCALED, output_error
from captum_priors.adapters.keep_graph import KeepGraph, calling_module, functions
from captum_priors.adapters.methods import ModeAdapter, adapters_of
from captum_priors.adapters.modules import path_of, warn_once
from captum_priors.adapters.selecting import without_sum

# What bends a network: torch's functions that rules have to cover.
NONLINEAR = functions(
    *("relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("softplus", "softsign", "sigmoid", "hardsigmoid", "logsigmoid", "tanh", "hardtanh"),
    *("hardswish", "softmax", "log_softmax", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
)
# DeepLift's default: differences below it count as none, and the gradient takes their place.
_EPS = 1e-10


class KeepRules(KeepGraph):
    """Also warns of what bends the network, and is no module that has a rule."""

    _ruled: ClassVar[frozenset[Any]] = NONLINEAR
    _rules_for: ClassVar[tuple[type, ...]] = ()
    _remedy: ClassVar[str] = "or use IntegratedGradients, which needs no rules."

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self._ruled:
            module = calling_module(self.explainer.forward_func)
            if module is not None and not self._has_rule(module):
                self._warn(func.__name__, module)
        return super().__torch_function__(func, types, args, kwargs)

    def _has_rule(self, module: Any) -> bool:
        return type(module) in self._rules_for

    def _warn(self, function: str, module: Any) -> None:
        model = without_sum(self.explainer.forward_func)
        kinds = ", ".join(kind.__name__ for kind in self._rules_for)
        warn_once(
            model,
            f"{self.explainer._stock.__name__}: expected a module with a rule ({kinds}) wherever "
            f"the network bends, found {function} in {path_of(module, model)}. The plain gradient "
            "passes there, as in Captum, and attributions through it are not what the method "
            f"promises. Give each such step a module of one of these types, {self._remedy}",
        )


class KeepGuided(KeepRules):
    """Guided backpropagation has a rule for ReLU, and none for anything else."""

    _ruled: ClassVar[frozenset[Any]] = functions("relu")
    _rules_for: ClassVar[tuple[type, ...]] = (nn.ReLU,)

    def _has_rule(self, module: Any) -> bool:
        return isinstance(module, nn.ReLU)


class KeepRescale(KeepRules):
    """Also divides without dividing by zero, and puts back what max-pooling took once."""

    _rules_for: ClassVar[tuple[type, ...]] = RESCALED
    _rewrites: ClassVar[dict[Any, str]] = {
        **KeepGraph._rewrites,
        torch.chunk: "_chunk",
        Tensor.div: "_divide",  # what the operator arrives as
        F.max_unpool1d: "_unpool1d",
        F.max_unpool2d: "_unpool2d",
        F.max_unpool3d: "_unpool3d",
    }
    _only_in: ClassVar[dict[Any, str]] = {Tensor.div: ca.DeepLift.__module__}

    def _chunk(self, tensor: Any, chunks: int, **options: Any) -> Any:
        if isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[0] % 2):
            raise output_error(tensor, 2 * self.n_rows)  # of the inputs, and of the baselines
        return torch.chunk(tensor, chunks, **options)

    def _divide(self, numerator: Any, denominator: Any) -> Any:
        if isinstance(denominator, Tensor):
            # torch.where discards these quotients, and not the NaN in their gradients.
            small = denominator.abs() < getattr(self.explainer, "eps", _EPS)
            denominator = torch.where(small, 1, denominator)
        return numerator / denominator

    def _unpool(
        self,
        spread: Callable[..., Tensor],
        n: int,
        values: Tensor,
        indices: Tensor,
        *sizes: Any,
        **options: Any,
    ) -> Tensor:
        """Where windows overlap, torch keeps one of the values and returns a gradient to all."""
        kept = values.flatten(-n)
        places = torch.arange(1, kept.shape[-1] + 1, dtype=torch.float64, device=values.device)
        places = places.expand(kept.shape).reshape(values.shape)
        winners = spread(places, indices, *sizes, **options)
        padded = torch.cat([torch.zeros_like(kept[..., :1]), kept], -1)
        return padded.gather(-1, winners.long().flatten(-n)).reshape(winners.shape)

    _unpool1d = partialmethod(_unpool, F.max_unpool1d, 1)
    _unpool2d = partialmethod(_unpool, F.max_unpool2d, 2)
    _unpool3d = partialmethod(_unpool, F.max_unpool3d, 3)


class GuidedAdapter(ModeAdapter):
    """Runs guided backpropagation, or deconvolution, under :class:`KeepGuided`."""

    _mode: ClassVar[type[KeepGraph]] = KeepGuided


class RescaleAdapter(ModeAdapter):
    """Runs the DeepLIFT family under :class:`KeepRescale`."""

    _mode: ClassVar[type[KeepGraph]] = KeepRescale
    _marks: ClassVar[tuple[str, ...]] = ("input", "input_ref", "output")

    def _marked(self) -> list[nn.Module]:
        return [m for m in self._modules() if type(m) in RESCALED]

    def _captured(self) -> list[nn.Module]:
        return list(dict.fromkeys([*super()._captured(), *self._marked()]))


globals().update(
    adapters_of(
        GuidedAdapter,
        __name__,
        "Deconvolution",
        "GuidedBackprop",
        "GuidedGradCam",
        "NeuronDeconvolution",
        "NeuronGuidedBackprop",
    ),
    **adapters_of(
        RescaleAdapter,
        __name__,
        "DeepLift",
        "DeepLiftShap",
        "LayerDeepLift",
        "LayerDeepLiftShap",
        "NeuronDeepLift",
        "NeuronDeepLiftShap",
    ),
)
