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
def constant_slopes(outputs: Iterable[Tensor], since: int) -> Iterator[None]:
    """Take gradients of the outputs without a graph through zero derivatives of operators.

    Of those alone that ran since the given moment: what was made before is somebody else's.
    """
    handles = []
    if not _saves_elsewhere():
        handles = [
            node.register_hook(_hook(node, name))
            for node in nodes(outputs)
            if (name := node.name()) in _RULES and node._sequence_nr() >= since
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _saves_elsewhere() -> bool:
    """Whether hooks keep what graphs save (checkpointing does), and count who asks for it."""
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def _hook(node: Any, name: str) -> Callable[..., Any]:
    def hook(gradients: tuple[Tensor | None, ...], arriving: tuple[Tensor | None, ...]) -> Any:
        if len(gradients) != 1 or len(arriving) != 1:
            return None
        (gradient,), (given,) = gradients, arriving
        if gradient is None or given is None or not _is_made_of(gradient, given, _SECOND[name]):
            return None
        found = _RULES[name](node, gradient.grad_fn, given, gradient.detach())
        found.data = gradient.detach()  # the same numbers, or what another hook has made of them
        return (found,)

    return hook


def _is_made_of(gradient: Tensor, given: Tensor, second: str) -> bool:
    """Whether the gradient is what the operator made of the given one, and not another hook."""
    made: Any = gradient.grad_fn
    if made is None or made.name() != second:
        return False
    source: Any = made.next_functions[0][0]
    if given.grad_fn is None and source is not None:
        return source.variable is given
    return source is given.grad_fn
