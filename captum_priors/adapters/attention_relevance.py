r"""Relevance by rules for the functions that a network calls, whatever modules call them.

Without stabilisers, layer-wise relevance propagation is :math:`x \odot \nabla\tilde f(x)`, where
:math:`\tilde f` has the values of the network and other derivatives: each rule says what counts as
constant while relevance goes back. The rules are those of AttnLRP (Achtibat et al. 2024,
arXiv:2402.05602), :math:`[\cdot]` marking constants and :math:`n` counting the factors that carry
relevance:

- linear steps, sums, BatchNorm in evaluation mode, pooling, ReLU and softmax (its first-order
  Taylor expansion): as they are;
- activations: :math:`a(0) + x\,[(a(x) - a(0)) / x]` (identity rule);
- products and matrix products: :math:`1/n` of the relevance to each factor (uniform rule), so
  in attention a quarter to queries and keys each and half to values;
- LayerNorm, RMSNorm, GroupNorm, InstanceNorm, quotients: what divides is constant.

These constants depend on the parameters, and the training gradient has to go through them. Each
rule therefore joins two graphs by ``splice``: one for relevance, and one for every derivative that
is taken afterwards.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_priors.adapters.keep_graph import functions
from captum_priors.adapters.modules import warn_once


class _Splice(torch.autograd.Function):
    """One tensor's place in the graph with the value of another.

    Relevance goes on to the place; what is differentiated afterwards is the value.
    """

    @staticmethod
    def forward(ctx: Any, mode: Any, place: Tensor, value: Tensor) -> Tensor:
        ctx.mode = mode
        return value.detach().clone()  # the model may work in place on what it is given

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, gradient, None) if ctx.mode.propagating else (None, None, gradient)


splice: Callable[..., Tensor] = _Splice.apply

# Applied to each number by itself; those of several arguments carry relevance in the first.
_ELEMENTWISE = functions(
    *("relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "sigmoid"),
    *("hardsigmoid", "logsigmoid", "tanh", "hardtanh", "hardswish", "erf", "sin", "square"),
)
_LAYERS = functions("linear", "conv1d", "conv2d", "conv3d", "bilinear")  # two factors, and others
_PRODUCTS = functions("mul", "multiply", "matmul", "bmm", "mm", "mv", "dot", "einsum") | _LAYERS
_FACTORS = ("other", "mat2", "vec", "tensor")  # what a second factor is called
_QUOTIENTS = functions("div", "divide", "true_divide")
_DIVISORS = functions("rsqrt", "reciprocal", "__rdiv__", "__rtruediv__")
_POWERS = functions("pow", "__pow__")
_RECURRENT = functions("lstm", "gru", "rnn_tanh", "rnn_relu")


class Relevance(TorchFunctionMode):
    """Runs a network so that its gradient is what relevance is made of, while it propagates.

    Tensors that carry relevance have a note of it: what :meth:`carrying` is given, and all that is
    made of it. The rules are for these; with a parameter or a constant, a product is linear.

    Args:
        model: What runs, for warnings.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.propagating = model, True

    def carrying(self, value: Any) -> Any:
        """Note that relevance reaches the tensors of a value, and return it."""
        for tensor in _tensors(value):
            if tensor.requires_grad:
                tensor._relevance = self  # type: ignore[attr-defined]  # the note
        return value

    def carries(self, value: Any) -> bool:
        """Whether relevance reaches a tensor of the value."""
        return any(getattr(tensor, "_relevance", None) is self for tensor in _tensors(value))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not self.carries(args) and not self.carries(tuple(kwargs.values())):
            return func(*args, **kwargs)
        name = _RULES.get(func)
        if name is None:
            return self.carrying(func(*args, **kwargs))
        first = [kwargs.pop("input")] if "input" in kwargs else []
        return getattr(self, name)(func, *first, *args, **kwargs)

    # ---- What rules are made of ----------------------------------------------------------

    def _held(self, value: Tensor) -> Tensor:
        """Return the value, constant to relevance."""
        return splice(self, value.detach(), value) if value.requires_grad else value

    def _share(self, value: Any, share: float) -> Any:
        """Return the value with a share of its relevance."""
        whole = share == 1 or not isinstance(value, Tensor) or not self.carries(value)
        return value if whole else splice(self, share * value, value)

    def _result(self, given: Any, own: Any, value: Any, place: Any = None) -> Any:
        """Return what a function made of a copy of its argument, or put it into the argument."""
        found = value if place is None else splice(self, place, value)
        in_place = value is own and own is not given
        return self.carrying(given.copy_(found) if in_place else found)

    # ---- The rules -----------------------------------------------------------------------

    def _elementwise(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given, own = x, x.clone()
        value = func(own, *args, **kwargs)
        x = x.clone() if value is own else x  # which will be written over
        at = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # Where a quotient would be noise, that of a number next to it.
        near = math.sqrt(torch.finfo(at.dtype).eps)
        at = torch.where(at.abs() < near, near, at)
        zero = func(torch.zeros_like(at), *args, **kwargs)
        slope = (func(at.clone(), *args, **kwargs) - zero) / at
        return self._result(given, own, value, x * self._held(slope.to(x.dtype)))

    def _power(self, func: Any, x: Any, exponent: Any, **kwargs: Any) -> Any:
        if not isinstance(exponent, (int, float)):
            return self.carrying(func(x, exponent, **kwargs))
        rule = self._elementwise if exponent > 0 else self._divisor
        return rule(func, x, exponent, **kwargs)

    def _product(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        named = [kwargs.pop(name) for name in _FACTORS if name in kwargs]
        args = (*args, *named)
        if isinstance(args[0], str) and isinstance(args[1], (tuple, list)):
            args = (args[0], *args[1])  # einsum
        end = 2 if func in _LAYERS else len(args)
        n = sum(map(self.carries, args[:end]))
        own = [self._share(arg, 1 / n) if n else arg for arg in args[:end]]
        return self._result(args[0], own[0], func(*own, *args[end:], **kwargs))

    def _quotient(self, func: Any, x: Any, other: Any, **kwargs: Any) -> Any:
        other = self._held(other) if isinstance(other, Tensor) else other
        found = func(x, other, **kwargs)
        return self.carrying(found) if self.carries(x) else found

    def _divisor(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self._held(func(*args, **kwargs))

    def _attention(self, func: Any, query: Any, key: Any, value: Any, *args: Any, **kw: Any) -> Any:
        # Its weights are one factor, a function of the product of queries and keys the other.
        n = sum(map(self.carries, (query, key)))
        weights = 0.5 if self.carries(value) else 1.0
        query, key = (self._share(each, weights / max(n, 1)) for each in (query, key))
        value = self._share(value, 0.5 if n else 1.0)
        return self.carrying(func(query, key, value, *args, **kw))

    def _recurrent(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        warn_once(
            self.model,
            f"LRP: expected functions that it has a rule for, found {func.__name__}. The plain "
            "gradient passes there, and relevance is not conserved. Use IntegratedGradients, "
            "which needs no rules.",
        )
        return self.carrying(func(*args, **kwargs))

    def _normalised(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Scale groups of numbers by a statistic of theirs that is constant to relevance."""
        value = func(x, *args, **kwargs)
        known = _NORMS[func](x, *args, **kwargs)
        if known is None:
            return self.carrying(value)
        groups, weight, eps, centred = known
        each = x.reshape(*groups, -1)
        each = each - each.mean(-1, keepdim=True) if centred else each
        scale = (each.square().mean(-1, keepdim=True) + eps).rsqrt()
        place = (each * self._held(scale)).reshape(x.shape)
        return self._result(x, None, value, place if weight is None else place * weight)

    def _normalize(
        self, func: Any, x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12,
        out: Any = None,
    ) -> Any:  # fmt: skip
        length = x.norm(p, dim, keepdim=True).clamp_min(eps)
        return self._result(x, None, func(x, p, dim, eps, out=out), x / self._held(length))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors among the arguments or the results of a function."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _by_channel(weight: Any, x: Tensor) -> Any:
    return None if weight is None else weight.reshape(1, -1, *[1] * (x.dim() - 2))


def _of_instances(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    return (x.shape[:2], _by_channel(weight, x), eps, True) if use_input_stats else None


# What is scaled together, by what weight, with what added to the variance, and whether its mean is
# taken off; None for statistics that are constants anyway.
_NORMS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: lambda x, normalized_shape, weight=None, bias=None, eps=1e-5: (
        (x.shape[: -len(normalized_shape)], weight, eps, True)
    ),
    F.rms_norm: lambda x, normalized_shape, weight=None, eps=None: (
        (x.shape[: -len(normalized_shape)], weight, eps or torch.finfo(x.dtype).eps, False)
    ),
    F.group_norm: lambda x, num_groups, weight=None, bias=None, eps=1e-5: (
        ((len(x), num_groups), _by_channel(weight, x), eps, True)
    ),
    F.instance_norm: _of_instances,
}
_RULES: dict[Any, str] = {
    **dict.fromkeys(_ELEMENTWISE, "_elementwise"),
    **dict.fromkeys(_POWERS, "_power"),
    **dict.fromkeys(_PRODUCTS, "_product"),
    **dict.fromkeys(_QUOTIENTS, "_quotient"),
    **dict.fromkeys(_DIVISORS, "_divisor"),
    **dict.fromkeys(_RECURRENT, "_recurrent"),
    F.scaled_dot_product_attention: "_attention",
    F.multi_head_attention_forward: "_attention",
    **dict.fromkeys(_NORMS, "_normalised"),
    F.normalize: "_normalize",
}
