r"""Layer-wise relevance propagation with its graph, by Captum's own code.

LRP runs the model twice: once to record each layer's input :math:`a`, once with the weights that
its rules change, feeding :math:`a` to every layer, and propagates relevance backward through hooks.
Captum writes the changed weights and the recorded inputs into tensors with ``tensor.data = value``,
where no gradient follows. Here nothing is written: the values are noted, and stand in for the
tensors in every later call of the attribution.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from captum.attr import LRP, LayerLRP
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from captum_priors._captum import CAPTUM_RULES, PropagationRule
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.adapters.keep_graph import KeepGraph, functions
from captum_priors.adapters.methods import ModeAdapter
from captum_priors.adapters.rules import NONLINEAR, KeepRules
from captum_priors.engine.gradients import nodes

_GET, _SET = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]  # a descriptor


class _Splice(torch.autograd.Function):
    """One tensor's place in the graph with the value of another.

    Relevance goes on to the place; what is differentiated afterwards is the value.
    """

    @staticmethod
    def forward(ctx: Any, mode: "KeepRelevance", place: Tensor, value: Tensor) -> Tensor:
        ctx.mode = mode
        return value.detach().clone()  # the model may work in place on what it is given

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, gradient, None) if ctx.mode.propagating else (None, None, gradient)


class KeepRelevance(KeepRules):
    """Also keeps what LRP writes into ``data``, without writing it."""

    # ReLU and max-pooling pass relevance on as rules would.
    _ruled: ClassVar[frozenset[Any]] = NONLINEAR - functions(
        "relu", "max_pool1d", "max_pool2d", "max_pool3d"
    )
    _rules_for: ClassVar[tuple[type, ...]] = (nn.ReLU, nn.Tanh, nn.Dropout)
    _rewrites: ClassVar[dict[Any, str]] = {
        **KeepRules._rewrites,
        _GET: "_detach",
        _SET: "_set_data",
    }

    def __init__(self, explainer: Any, n_rows: int) -> None:
        super().__init__(explainer, n_rows)
        self.propagating = False
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._replaced: list[Tensor] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._written and func not in (_SET, Tensor.register_hook):
            args, kwargs = self._read(args), self._read(kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)

    def release(self) -> None:
        """Remove the hooks and let go of everything that was noted."""
        super().release()
        self._written.clear()
        for gradient in self._replaced:
            vars(gradient).pop("replace_out", None)
        self._replaced.clear()

    def _has_rule(self, module: Any) -> bool:
        # Captum has a rule for every module without children, or refuses it.
        return isinstance(module, nn.Module) and next(module.children(), None) is None

    def _read(self, value: Any) -> Any:
        """Let what was written stand in for the tensors that it was written to."""
        if isinstance(value, Tensor):
            return self._written.get(id(value), (None, value))[1]
        if type(value) in (tuple, list):
            return type(value)(map(self._read, value))
        if type(value) is dict:
            return {key: self._read(each) for key, each in value.items()}
        return value

    def _set_data(self, tensor: Tensor, value: Tensor) -> None:
        if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
            splice: Callable[..., Tensor] = _Splice.apply
            value = splice(self, tensor, value)
        self._written[id(tensor)] = (tensor, value)

    def _grad(self, outputs: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        _refuse_functions(outputs if isinstance(outputs, (tuple, list)) else [outputs])
        self.propagating = True
        try:
            return super()._grad(outputs, inputs, *args, **options)
        finally:
            self.propagating = False

    def _register_hook(self, tensor: Tensor, hook: Any) -> RemovableHandle:
        def noted(gradient: Tensor) -> Any:
            result = hook(gradient)
            if "replace_out" in vars(gradient):
                # Captum's message from one hook to the next: a cycle that no collector sees.
                self._replaced.append(gradient)
            return result

        return super()._register_hook(tensor, noted)


def _refuse_functions(outputs: Sequence[Tensor]) -> None:
    """Refuse functions of the model's own: what stands in for their arguments does not reach them.

    Torch shows a mode every operator, and not ``torch.autograd.Function.apply``.
    """
    for node in nodes(outputs):
        is_function = isinstance(node, BackwardCFunction)
        if is_function and node.name() != f"{_Splice.__name__}Backward":
            raise refusal(
                NotDifferentiableError,
                "LRP with a graph",
                "a model of torch's own operators",
                f"a torch.autograd.Function ({node.name()})",
                "Write its forward pass in operators, or attribute under torch.no_grad().",
            )


def _refuse_rules(modules: Iterable[nn.Module]) -> None:
    """Refuse rules that are not Captum's own: any code may be in them, on values or in place."""
    for module in modules:
        rule = getattr(module, "rule", None)
        if isinstance(rule, PropagationRule) and type(rule) not in CAPTUM_RULES:
            raise refusal(
                NotDifferentiableError,
                "`rule`",
                "one of Captum's: " + ", ".join(cls.__name__ for cls in CAPTUM_RULES),
                f"{type(rule).__name__} on a {type(module).__name__}",
                "A rule of your own has no certified gradient; attribute under "
                "torch.no_grad(), where it runs as in Captum.",
            )


class RelevanceAdapter(ModeAdapter):
    """Runs LRP under :class:`KeepRelevance`; for values alone, as Captum does."""

    _mode: ClassVar[type[KeepGraph]] = KeepRelevance
    _marks: ClassVar[tuple[str, ...]] = ("activations", "rule")
    _originals: tuple[tuple[nn.Parameter, Tensor], ...] = ()

    def _marked(self) -> list[nn.Module]:
        return [m for m in self._modules() if next(m.children(), None) is None]

    def _without_graph(self, given: dict[str, Any]) -> Any:
        worker = copy.copy(self)
        parameters = (p for module in self._modules() for p in module.parameters(recurse=False))
        worker._originals = tuple((p, p.data) for p in parameters)
        return super(RelevanceAdapter, worker)._without_graph(given)

    def _with_graph(self, given: dict[str, Any]) -> Any:
        _refuse_rules(self._modules())
        # What LRP notes about itself on the way holds the graph: leave it on a copy.
        return super(RelevanceAdapter, copy.copy(self))._with_graph(given)

    def _restore_state(self) -> None:
        """Give the parameters their own storage back, which no graph of the user's notices.

        Captum copies their values into the storage that it made. With a graph, none was written.
        """
        for parameter, data in self._originals:
            parameter.data = data


class DifferentiableLRP(RelevanceAdapter, LRP):
    """:class:`captum.attr.LRP` with its graph."""

    _stock = LRP


class DifferentiableLayerLRP(RelevanceAdapter, LayerLRP):
    """:class:`captum.attr.LayerLRP` with its graph."""

    _stock = LayerLRP
