"""Captum's methods that run whole under :class:`KeepGraph`, Captum's code and all."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import captum.attr
import torch
from captum.attr import LayerFeaturePermutation, NoiseTunnel
from torch import Tensor, nn

from captum_priors._captum import as_tuple, logits_returned
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors._rows import Rows
from captum_priors.adapters.captum import CaptumAdapter, adapted
from captum_priors.adapters.keep_graph import KeepGraph
from captum_priors.adapters.modules import path_of, put_back, warn_once, watched
from captum_priors.adapters.runs import Runs, RunsAgain, attribute_runs, may_run_apart
from captum_priors.engine import Visit, current_pass, recompute, submodules_of
from captum_priors.engine.random import GlobalState


class ModeAdapter(CaptumAdapter):
    """Runs the stock method under :class:`KeepGraph`.

    Perturbation methods need first derivatives only, so they work on models whose backward pass
    cannot be differentiated; gradient methods are differentiated twice.
    """

    differentiations: ClassVar[tuple[str, ...]] = ("double_backprop", "recompute")
    _mode: ClassVar[type[KeepGraph]] = KeepGraph
    _marks: ClassVar[tuple[str, ...]] = ()  # attributes that the method sets on modules
    runs: Runs | None = None  # what each run of its layer passes through, if there are several

    def _attribute_with_graph(self, given: dict[str, Any]) -> Any:
        tensors = self._check_call(given)
        state = GlobalState.now(self.draws) if self.draws and self._captured() else None
        try:
            with watched(self._captured(), self._on_second_run):
                return self._attribute_once(given, tensors)
        except RunsAgain:
            if state is not None:
                state.restore()
            found = attribute_runs(self, given, tensors)
            if found is not None:
                return found
        with watched(self._captured(), self._warn_of_second_run):
            return self._attribute_once(given, tensors)

    def _attribute_once(self, given: dict[str, Any], tensors: tuple[Tensor, ...]) -> Any:
        if not torch.is_grad_enabled():
            return self._without_graph(self._copies(given, tensors))
        self._check()
        held = getattr(current_pass(), "statistics", None)
        model = getattr(self, "forward_func", None)
        with nullcontext() if held is None else held.on_calls(model, tensors):
            if self.differentiation == "double_backprop":
                return self._with_graph(self._copies(given, tensors))
            return self._recomputed(given, tensors)

    def _run_stock(self, **given: Any) -> Any:
        runs = nullcontext() if self.runs is None else self.runs.apart()
        # Captum's wrappers of language models look for logits themselves.
        model = getattr(self, "forward_func", None) if self.takes_tensors else None
        with runs, logits_returned(model):
            return super()._run_stock(**given)

    def _on_second_run(self, layer: nn.Module) -> None:
        if may_run_apart(self, layer):
            raise RunsAgain
        self._warn_of_second_run(layer)

    def _recomputed(self, given: dict[str, Any], tensors: tuple[Tensor, ...]) -> Any:
        if any(t.device.type != "cpu" for t in tensors):
            raise refusal(
                NotDifferentiableError,
                f"recompute of {self._stock.__name__}",
                "inputs on the CPU",
                f"{tensors[0].device}",
                "A graph made in a GPU's own thread cannot be told from an earlier one: use "
                "differentiation='double_backprop'.",
            )
        shape: list[Any] = []

        def program(arguments: tuple[Tensor, ...], visit: Visit) -> tuple[Tensor, ...]:
            leaves: list[Tensor] = []
            shape[:] = [_flatten(self._with_graph(self._copies(given, arguments)), leaves)]
            return visit(tuple(leaves))

        values = recompute(program, tensors, forward_func=self, streams=self.draws or ("torch",))
        return _unflatten(shape[0], iter(values))

    def _without_graph(self, given: dict[str, Any]) -> Any:
        with self._put_back() if self._marks else nullcontext():
            return self._run_stock(**given)

    def _with_graph(self, given: dict[str, Any]) -> Any:
        # What a neuron's selector returns may well be one number.
        counts = "target" in self._takes and self.takes_tensors
        first = as_tuple(given["inputs"])[0] if counts else torch.empty(1)
        mode = self._mode(self, first.shape[0] if first.dim() else 1)
        try:
            with self._put_back(), mode:
                return self._run_stock(**given)
        finally:
            mode.release()

    def _put_back(self) -> AbstractContextManager[None]:
        return put_back(self._modules(), self._marked(), self._marks)

    def _modules(self) -> tuple[nn.Module, ...]:
        """Every module that the method may leave something on."""
        model = getattr(self, "forward_func", None)
        return tuple(model.modules()) if isinstance(model, nn.Module) else submodules_of(self)

    def _marked(self) -> list[nn.Module]:
        """The modules that the method sets attributes on."""
        return []

    def _captured(self) -> list[nn.Module]:
        """The modules whose activations the method takes, which must run once."""
        layers = getattr(getattr(self, "grad_cam", self), "layer", ())
        return [layers] if isinstance(layers, nn.Module) else list(layers)

    def _warn_of_second_run(self, layer: nn.Module) -> None:
        model: Any = getattr(self, "forward_func", None)
        warn_once(
            layer,
            f"{self._stock.__name__}: expected modules that run once in each forward pass, found "
            f"that {path_of(layer, model)} runs again. Captum keeps the last of its runs, and the "
            "attributions leave out the others. Give each use a module of its own (they may share "
            "their weights), or use IntegratedGradients on the inputs.",
        )


def _flatten(value: Any, leaves: list[Tensor]) -> Any:
    """Replace the tensors in a structure of tuples and lists by their positions."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return len(leaves) - 1
    return type(value)(_flatten(v, leaves) for v in value)


def _unflatten(shape: Any, values: Iterator[Tensor]) -> Any:
    if isinstance(shape, int):
        return next(values)
    return type(shape)(_unflatten(s, values) for s in shape)


def adapters_of(base: type[ModeAdapter], module: str, *names: str) -> dict[str, Any]:
    """Make an adapter for each class, by a name in the module so that instances can be pickled."""
    made: dict[str, Any] = {}
    for name in names:
        members = {
            "_stock": getattr(captum.attr, name),
            "__module__": module,
            "__doc__": f":class:`captum.attr.{name}` with its graph.",
            "draws": _DRAWS.get(name, ()),
            "draws_baselines": name.endswith("Shap"),
        }
        made[f"Differentiable{name}"] = type(
            f"Differentiable{name}", (base, members["_stock"]), members
        )
    return made


# Random numbers come from here in Captum 0.9.
_DRAWS: dict[str, tuple[str, ...]] = {
    "FeaturePermutation": ("torch",),
    "GradientShap": ("torch", "numpy"),
    "LayerGradientShap": ("torch", "numpy"),
    "NeuronGradientShap": ("torch", "numpy"),
    "ShapleyValueSampling": ("torch",),
}
globals().update(
    adapters_of(
        ModeAdapter,
        __name__,
        "FeatureAblation",
        "FeaturePermutation",
        "GradientShap",
        "InternalInfluence",
        "LayerActivation",
        "LayerConductance",
        "LayerFeatureAblation",
        "LayerGradCam",
        "LayerGradientShap",
        "LayerGradientXActivation",
        "LayerIntegratedGradients",
        "NeuronConductance",
        "NeuronFeatureAblation",
        "NeuronGradient",
        "NeuronGradientShap",
        "NeuronIntegratedGradients",
        "Occlusion",
        "ShapleyValueSampling",
        "ShapleyValues",
    )
)


class DifferentiableLayerFeaturePermutation(ModeAdapter, LayerFeaturePermutation):
    """:class:`captum.attr.LayerFeaturePermutation` with its graph, and with its target.

    Captum selects the target twice, of the outputs and of what it has selected, and fails. Here it
    is selected within the forward function.
    """

    _stock = LayerFeaturePermutation
    draws: ClassVar[tuple[str, ...]] = ("torch",)
    forward_func: Any

    def _run_stock(self, **given: Any) -> Any:
        target = given.pop("target", None)
        worker = copy.copy(self)
        if target is not None:
            n_rows = as_tuple(given["inputs"])[0].shape[0]

            def selected(*inputs: Any) -> Any:
                return Rows(self.forward_func, target, (), n_rows)(inputs)

            worker.forward_func = selected
        return super(DifferentiableLayerFeaturePermutation, worker)._run_stock(**given)


class DifferentiableNoiseTunnel(ModeAdapter, NoiseTunnel):
    """:class:`captum.attr.NoiseTunnel` with its graph: what it averages keeps its own."""

    _stock = NoiseTunnel
    # Those of what it averages, too.
    draws: ClassVar[tuple[str, ...]] = ("torch", "numpy", "python")
    attribution_method: Any

    def _check(self) -> None:
        adapted(self.attribution_method)

    def _captured(self) -> list[nn.Module]:
        return []  # what it averages looks at them itself

    def _run_stock(self, **given: Any) -> Any:
        worker = copy.copy(self)
        worker.attribution_method = adapted(self.attribution_method)
        return super(DifferentiableNoiseTunnel, worker)._run_stock(**given)
