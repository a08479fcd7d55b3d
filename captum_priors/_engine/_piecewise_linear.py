"""ReLU, pooling and the like: slopes constant between kinks, hence second derivatives of zero.

Torch keeps a graph from the slope to what it was taken at all the same, and a second backward pass
carries its zeros through the whole forward pass of the model. Without that graph the gradients
that remain are the same numbers, networks of these operators take about a fifth less time, and the
activations of the forward pass are let go with the first backward pass.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_priors._engine._graph import nodes

_aten = torch.ops.aten


# What the second derivative's node of each keeps, taken as a constant, and of tensors that are read
# for their shape alone any other of that shape.


def _relu(node: Any, made: Any, gradient: Tensor, like: Tensor) -> Any:
    return _aten.threshold_backward(gradient, made._saved_self.detach(), made._saved_threshold)


def _leaky_relu(node: Any, made: Any, gradient: Tensor, like: Tensor) -> Any:
    return _aten.leaky_relu_backward(
        gradient, made._saved_self.detach(), made._saved_negative_slope, False
    )


def _hardtanh(node: Any, made: Any, gradient: Tensor, like: Tensor) -> Any:
    return _aten.hardtanh_backward(
        gradient, made._saved_self.detach(), made._saved_min_val, made._saved_max_val
    )


def _max_pool(node: Any, made: Any, gradient: Tensor, like: Tensor) -> Any:
    return _aten.max_pool2d_with_indices_backward(
        gradient,
        like,
        node._saved_kernel_size,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_ceil_mode,
        made._saved_indices,
    )


def _avg_pool(node: Any, made: Any, gradient: Tensor, like: Tensor) -> Any:
    return _aten.avg_pool2d_backward(
        gradient,
        like,
        made._saved_kernel_size,
        made._saved_stride,
        made._saved_padding,
        made._saved_ceil_mode,
        made._saved_count_include_pad,
        made._saved_divisor_override,
    )


def _adaptive_avg_pool(node: Any, made: Any, gradient: Tensor, like: Tensor) -> Any:
    return _aten._adaptive_avg_pool2d_backward(gradient, like)


_RULES: dict[str, Callable[[Any, Any, Tensor, Tensor], Any]] = {
    "ReluBackward0": _relu,
    "LeakyReluBackward0": _leaky_relu,
    "HardtanhBackward0": _hardtanh,
    "MaxPool2DWithIndicesBackward0": _max_pool,
    "AvgPool2DBackward0": _avg_pool,
    "AdaptiveAvgPool2DBackward0": _adaptive_avg_pool,
}
# What torch calls the node that differentiates such a derivative.
_SECOND = {name: f"{name[:-1]}Backward0" for name in _RULES} | {
    "ReluBackward0": "ThresholdBackwardBackward0"
}


@contextmanager
def constant_slopes(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> Iterator[None]:
    """Take gradients of the outputs by the inputs without a graph through zero derivatives."""
    beyond = {tensor.grad_fn for tensor in inputs}
    handles = [
        node.register_hook(_hook(node, name))
        for node in nodes(outputs, without=beyond)
        if (name := node.name()) in _RULES
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(node: Any, name: str) -> Callable[..., Any]:
    def hook(gradients: tuple[Tensor | None], arriving: tuple[Tensor | None]) -> Any:
        (gradient,), (given,) = gradients, arriving
        if gradient is None or given is None:
            return None
        made: Any = gradient.grad_fn
        if made is None or made.name() != _SECOND[name]:  # another hook was here before
            return None
        return (_RULES[name](node, made, given, gradient.detach()),)

    return hook
