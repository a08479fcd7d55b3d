"""Adapters of the methods that run whole under :class:`KeepGraph`, Captum's code and all."""

from collections.abc import Iterator
from typing import Any, ClassVar

import captum.attr
import torch
from captum.attr import GradientAttribution, NoiseTunnel
from torch import Tensor, nn

from captum_priors._captum import as_tuple, like_inputs
from captum_priors._checks import check_target, check_tensors
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors.engine import Visit, recompute, submodules_of
from captum_priors._types import Differentiation
from captum_priors.adapters._captum_adapter import CaptumAdapter
from captum_priors.adapters._graph_mode import DEEP_LIFT_EPS, KeepGraph
from captum_priors.adapters._put_back import modules_put_back


class ModeAdapter(CaptumAdapter):
    """Runs the stock method with its graph kept.

    Perturbation methods need first derivatives only, so they work on models whose backward pass
    cannot be differentiated; gradient methods are differentiated twice.
    """

    differentiations: ClassVar[tuple[str, ...]] = ("double_backprop", "recompute")
    _mode: ClassVar[type[KeepGraph]] = KeepGraph
    _marks_modules: ClassVar[bool] = False  # leaves activations on them, also without a graph

    @classmethod
    def of(cls, explainer: Any, differentiation: Differentiation) -> Any:
        """Make the differentiable twin of a Captum explainer."""
        if getattr(explainer, "eps", DEEP_LIFT_EPS) < DEEP_LIFT_EPS:
            raise NotDifferentiableError(
                expected_found(
                    "`eps`",
                    f"at least {DEEP_LIFT_EPS:g}, below which quotients are not differentiated",
                    f"{explainer.eps:g}",
                    f"Make the {type(explainer).__name__} with a larger eps.",
                )
            )
        return super().of(explainer, differentiation)

    def _attribute_with_graph(self, given: dict[str, Any]) -> Any:
        inputs = given["inputs"]
        # Not that they are one batch: tables for embedding bags and empty features are welcome.
        check_tensors(inputs)
        tensors = as_tuple(inputs)
        if tensors[0].dim() > 0:
            check_target(given.get("target"), tensors[0].shape[0])
        if not torch.is_grad_enabled():
            return self._without_graph(given)
        if self.differentiation == "double_backprop":
            return self._with_graph({**given, "inputs": like_inputs(inputs, self._own(tensors))})
        if any(t.device.type != "cpu" for t in tensors):
            raise NotDifferentiableError(
                expected_found(
                    f"recompute of {self._stock.__name__}",
                    "inputs on the CPU",
                    f"{tensors[0].device}",
                    "A graph made in a GPU's own thread cannot be told from an earlier one: use "
                    "differentiation='double_backprop'.",
                )
            )
        shape: list[Any] = []

        def program(arguments: tuple[Tensor, ...], visit: Visit) -> tuple[Tensor, ...]:
            own = like_inputs(inputs, self._own(arguments))
            leaves: list[Tensor] = []
            shape[:] = [_flatten(self._with_graph({**given, "inputs": own}), leaves)]
            return visit(tuple(leaves))

        values = recompute(program, tensors, forward_func=self)
        return _unflatten(shape[0], iter(values))

    def _own(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return tensors that Captum may flag as it likes, and need not warn about."""
        flags = isinstance(self, (GradientAttribution, NoiseTunnel))
        return tuple(
            t if t.requires_grad else t.detach().requires_grad_(flags and t.is_floating_point())
            for t in tensors
        )

    def _without_graph(self, given: dict[str, Any]) -> Any:
        if not self._marks_modules:
            return self._run_stock(**given)
        with modules_put_back(self._modules()):
            return self._run_stock(**given)

    def _modules(self) -> tuple[nn.Module, ...]:
        """Every module that the method may leave something on."""
        model = getattr(self, "forward_func", None)
        return tuple(model.modules()) if isinstance(model, nn.Module) else submodules_of(self)

    def _with_graph(self, given: dict[str, Any]) -> Any:
        return self._under(self._mode(), given)

    def _under(self, mode: KeepGraph, given: dict[str, Any]) -> Any:
        try:
            with modules_put_back(self._modules()), mode:
                return self._run_stock(**given)
        finally:
            mode.release()


def _flatten(value: Any, leaves: list[Tensor]) -> Any:
    """Replace the tensors in a structure of tuples and lists by their positions."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return len(leaves) - 1
    return type(value)(_flatten(v, leaves) for v in value)


def _unflatten(shape: Any, values: Iterator[Tensor]) -> Any:
    return (
        next(values)
        if isinstance(shape, int)
        else type(shape)(_unflatten(s, values) for s in shape)
    )


NAMES = (
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "FeatureAblation",
    "FeaturePermutation",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "InternalInfluence",
    "LayerActivation",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerFeatureAblation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "NeuronConductance",
    "NeuronDeconvolution",
    "NeuronDeepLift",
    "NeuronDeepLiftShap",
    "NeuronFeatureAblation",
    "NeuronGradient",
    "NeuronGradientShap",
    "NeuronGuidedBackprop",
    "NeuronIntegratedGradients",
    "Occlusion",
    "ShapleyValueSampling",
    "ShapleyValues",
)
# Their baselines are a distribution, not one row for each example.
_DRAWING = {name for name in NAMES if name.endswith("Shap")}


def _adapter(stock: type) -> type[ModeAdapter]:
    """Make an adapter class, named and placed in this module so that instances can be pickled."""
    members = {
        "_stock": stock,
        "__module__": __name__,
        "__doc__": f":class:`captum.attr.{stock.__name__}` with its graph.",
        "draws_baselines": stock.__name__ in _DRAWING,
        "_marks_modules": "DeepLift" in stock.__name__,
    }
    return type(f"Differentiable{stock.__name__}", (ModeAdapter, stock), members)


MODE_ADAPTERS: dict[type, type[ModeAdapter]] = {
    stock: _adapter(stock) for stock in (getattr(captum.attr, name) for name in NAMES)
}
globals().update({adapter.__name__: adapter for adapter in MODE_ADAPTERS.values()})
