r"""Layer-wise relevance propagation with its graph, by Captum's own code.

LRP runs the model twice: once to record each layer's input :math:`a`, once with the weights that
its rules change, feeding :math:`a` to every layer, and propagates relevance backward through hooks.
Captum writes the changed weights and the recorded inputs into tensors with ``tensor.data = value``,
where no gradient follows. Here nothing is written: the values are noted, and stand in for the
tensors in every later call of the attribution.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from captum.attr import LRP, GradientAttribution, LayerLRP
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from captum_priors._captum import (
    CAPTUM_RULES,
    WITH_RULES,
    PropagationRule,
    forward_args,
    like_inputs,
)
from captum_priors._checks import check_module
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors._rows import Rows
from captum_priors._types import Differentiation
from captum_priors.adapters.attention_relevance import Relevance, splice
from captum_priors.adapters.keep_graph import KeepGraph, calling_module, functions
from captum_priors.adapters.methods import ModeAdapter
from captum_priors.adapters.modules import path_of, warn_once
from captum_priors.adapters.rules import NONLINEAR, KeepRules
from captum_priors.attr.layers import Layer, _LayerRows
from captum_priors.engine import Visit, input_gradients, keep_graph, recompute
from captum_priors.engine.gradients import nodes

_OWN = ("_SpliceBackward", "_ReluBackward", "_ConstantInPassBackward")  # functions of this package
_GET, _SET = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]  # a descriptor


# What joins two tensors, each of which has a part in the result.
_JOINS = functions("add", "sub", "mul", "matmul", "bmm", "div") | functions("cat")


def _is_hidden(value: Any) -> bool:
    """Whether it is a tensor that a layer has made, no input, parameter or constant."""
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


class KeepRelevance(KeepRules):
    """Also keeps what LRP writes into ``data``, without writing it."""

    # ReLU and max-pooling pass relevance on as rules would.
    _ruled: ClassVar[frozenset[Any]] = (
        NONLINEAR | functions("layer_norm", "rms_norm", "scaled_dot_product_attention")
    ) - functions("relu", "max_pool1d", "max_pool2d", "max_pool3d")
    _remedy: ClassVar[str] = "or use captum_priors.AttnLRP, whose rules are for functions."
    _rules_for: ClassVar[tuple[type, ...]] = (nn.ReLU, nn.Tanh, nn.Dropout)
    _rewrites: ClassVar[dict[Any, str]] = {
        **KeepRules._rewrites,
        _GET: "_detach",
        _SET: "_set_data",
    }

    def __init__(self, explainer: Any, n_rows: int) -> None:
        super().__init__(explainer, n_rows)
        self.propagating = self._joined = False
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
        if not self._joined and func in _JOINS and sum(map(_is_hidden, args)) > 1:
            module = calling_module(self.explainer.forward_func)
            if module is not None and not self._has_rule(module):
                self._joined = True
                self._warn_of_join(func.__name__, module)
        return super().__torch_function__(func, types, args, kwargs)

    def _warn_of_join(self, function: str, module: Any) -> None:
        model = self.explainer.forward_func
        warn_once(
            model,
            f"LRP: expected sums of layers in modules (Captum's Addition_Module), found {function} "
            f"in {path_of(module, model)}, to each term of which Captum hands the whole relevance. "
            "Use captum_priors.AttnLRP, which conserves it there.",
        )

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
        name = node.name()
        if isinstance(node, BackwardCFunction) and name not in _OWN:
            raise refusal(
                NotDifferentiableError,
                "LRP with a graph",
                "a model of torch's own operators",
                f"a torch.autograd.Function ({name})",
                "Write its forward pass in operators, or attribute under torch.no_grad().",
            )


def _refuse_rules(modules: Iterable[nn.Module], allowed: Sequence[type]) -> None:
    """Refuse other rules than Captum's: any code may be in them, on values or in place."""
    for module in modules:
        rule = getattr(module, "rule", None)
        if isinstance(rule, PropagationRule) and type(rule) not in allowed:
            raise refusal(
                NotDifferentiableError,
                "`rule`",
                "one of Captum's, or none where relevance is propagated by function",
                f"{type(rule).__name__} on a {type(module).__name__}",
                "Delete it, or use captum.attr.LRP, whose values have no graph.",
            )


@dataclass(frozen=True)
class _RelevantLayer(Layer):
    """A layer whose values carry relevance where they are replaced."""

    mode: Relevance | None = None

    @contextmanager
    def replaced(self, values: tuple[Tensor, ...]) -> Iterator[None]:
        """Let the layer return (or receive) the given values."""
        with super().replaced(self.mode.carrying(values) if self.mode else values):
            yield


class RelevanceAdapter(ModeAdapter):
    """Runs LRP under :class:`KeepRelevance`; for values alone, as Captum does.

    Networks with a layer that Captum has no rule for, which it refuses, have the rules of
    :class:`AttnLRP`.
    """

    _mode: ClassVar[type[KeepGraph]] = KeepRelevance
    _marks: ClassVar[tuple[str, ...]] = ("activations", "rule")
    _originals: tuple[tuple[nn.Parameter, Tensor], ...] = ()
    forward_func: Any
    compute_convergence_delta: Any

    def _marked(self) -> list[nn.Module]:
        return [m for m in self._modules() if next(m.children(), None) is None]

    def _by_module(self) -> bool:
        """Whether Captum's own code runs: each layer has a rule."""
        layers = [m for m in self._marked() if m is not self.forward_func]
        return all(type(m) in WITH_RULES or hasattr(m, "rule") for m in layers)

    def _attribute_with_graph(self, given: dict[str, Any]) -> Any:
        if self._by_module():
            return super()._attribute_with_graph(given)
        self._check()
        _refuse_rules(self._modules(), ())
        tensors = self._check_call(given)

        def program(arguments: tuple[Tensor, ...], visit: Visit) -> tuple[Tensor, ...]:
            return visit(self._propagated(arguments, given))

        if self.differentiation == "recompute":
            *found, output = recompute(program, tensors, forward_func=self.forward_func)
        else:
            *found, output = program(tensors, keep_graph)
        relevances = self._like_explained(given["inputs"], tuple(found))
        if not given.get("return_convergence_delta", False):
            return relevances
        return relevances, self.compute_convergence_delta(relevances, output)

    def _propagated(self, tensors: tuple[Tensor, ...], given: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the relevance of what is explained, and the output."""
        mode, outputs = Relevance(self.forward_func), list[Tensor]()
        rows, points = self._explained(mode, tensors, given)

        def field(own: tuple[Tensor, ...]) -> Tensor:
            outputs[:] = [rows(own)]
            _refuse_functions(outputs)
            return outputs[0]

        try:
            gradients = input_gradients(field, points)
        finally:
            mode.propagating = False
        relevances = [p * g for p, g in zip(points, gradients, strict=True)]
        return (*relevances, outputs[0] if torch.is_grad_enabled() else outputs[0].detach())

    def _explained(
        self, mode: Relevance, tensors: tuple[Tensor, ...], given: dict[str, Any]
    ) -> tuple[Rows, tuple[Tensor, ...]]:
        """Return the output as a function of what is explained, and that."""
        k, args = len(tensors), forward_args(given.get("additional_forward_args"))

        def run(*passed: Any) -> Any:
            with mode:
                return self.forward_func(*mode.carrying(passed[:k]), *passed[k:])

        return Rows(run, given.get("target"), args, tensors[0].shape[0]), tensors

    def _like_explained(self, inputs: Any, relevances: tuple[Tensor, ...]) -> Any:
        return like_inputs(inputs, relevances)

    def _without_graph(self, given: dict[str, Any]) -> Any:
        worker = copy.copy(self)
        parameters = (p for module in self._modules() for p in module.parameters(recurse=False))
        worker._originals = tuple((p, p.data) for p in parameters)
        return super(RelevanceAdapter, worker)._without_graph(given)

    def _with_graph(self, given: dict[str, Any]) -> Any:
        _refuse_rules(self._modules(), CAPTUM_RULES)
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
    layer: Any

    def _explained(
        self, mode: Relevance, tensors: tuple[Tensor, ...], given: dict[str, Any]
    ) -> tuple[Rows, tuple[Tensor, ...]]:
        check_module("layer", self.layer)  # Captum takes a list, too

        def run(*passed: Any) -> Any:
            with mode:
                return self.forward_func(*passed)

        args = forward_args(given.get("additional_forward_args"))
        layer = _RelevantLayer(run, self.layer, bool(given.get("attribute_to_layer_input")), mode)
        points, times = layer.activations(tensors, args)
        n = len(tensors[0])
        return _LayerRows(run, given.get("target"), args, n, layer, tensors, times), points

    def _like_explained(self, inputs: Any, relevances: tuple[Tensor, ...]) -> Any:
        return relevances[0] if len(relevances) == 1 else relevances


class AttnLRP(DifferentiableLRP):
    r"""Layer-wise relevance propagation by function: for transformers and residual networks.

    .. math:: \phi = x \odot \nabla\tilde f(x)

    where :math:`\tilde f` is the network with constants in it (AttnLRP, Achtibat et al. 2024,
    arXiv:2402.05602, without stabilisers): :math:`a(x)` is :math:`x\,[a(x) / x]` for GELU, SiLU and
    tanh; what LayerNorm and RMSNorm divide by is constant; each of :math:`n` factors has
    :math:`1/n` of a product's relevance, in gates and in attention; softmax, sums, ReLU, pooling
    and BatchNorm in evaluation mode are as they are. Functions without a rule pass the gradient.

    ``differentiable(LRP(model))`` is this where Captum's LRP refuses a layer, and Captum's own
    numbers elsewhere: those leave out the functions that a model calls itself, and hand the whole
    relevance to each term of a sum that is no ``Addition_Module``.

    Relevance is conserved but for what is added (biases, positions) and for softmax, which keeps
    its values' relevance less that of its first-order part: half of what reaches the attention
    where all logits are zero. Rules of the user's own are refused.

    Args:
        forward_func: A model, or any function of the inputs.
        differentiation: ``"double_backprop"`` or ``"recompute"``, as in :class:`ExpectedGradients`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_priors import AttnLRP
        >>> block = nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.LayerNorm(8))
        >>> model, x = nn.Sequential(block, nn.Linear(8, 2, bias=False)), torch.randn(5, 4)
        >>> relevance = AttnLRP(model).attribute(x, target=1)
        >>> torch.allclose(relevance.sum(1), model(x)[:, 1], atol=1e-5)
        True
    """

    def __init__(
        self, forward_func: Any, *, differentiation: Differentiation = "double_backprop"
    ) -> None:
        GradientAttribution.__init__(self, forward_func)  # LRP's own takes modules alone
        self.model = forward_func
        self.with_differentiation(differentiation)

    def _by_module(self) -> bool:
        return False
