"""What is needed of torch that torch keeps private or does not document (torch 2.13).

An upgrade is checked here. ``tests/test_architecture.py`` lists these names.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

T = TypeVar("T")

# Private: the one base of all normalisation layers with running statistics, lazy ones included.
Normalisation = _NormBase

# Nodes that raise when a second backward pass reaches them. The first two are torch's placeholders
# for "no derivative" and for once-differentiable functions; the others raise only when executed.
PLACEHOLDERS = {"torch::autograd::NotImplemented", "torch::autograd::Error"}
DEAD_ENDS = PLACEHOLDERS | {
    "CompiledFunctionBackwardBackward",
    "CdistBackwardBackward0",
    "CudnnRnnBackwardBackward0",
}

# What torch's own refusals of a second derivative have in their text, and what stands behind them.
REFUSALS = {
    "use_reentrant": "reentrant activation checkpointing",
    "donated buffer": "CompiledFunctionBackward",
}

# Private: the module that compiles. Where nobody imported it, nothing can be compiled.
COMPILER = "torch._dynamo"

# Undocumented: `torch.manual_seed` would also queue work for GPUs that nobody uses.
default_generator: torch.Generator = torch.default_generator

_LEAF = torch.zeros((), device="cpu", requires_grad=True)


def now() -> int:
    """Mark this moment: nodes made from now on have numbers at least as large in this thread.

    Private: the number by which the autograd engine orders nodes, the only sign of their age.
    """
    with torch.enable_grad():
        node: Any = _LEAF.view(()).grad_fn
    return int(node._sequence_nr())


def older(node: Any, moment: int) -> bool:
    """Whether a node was made before the moment."""
    return bool(node._sequence_nr() < moment)


def leaf_of(node: Any) -> Tensor | None:
    """Return the leaf tensor that an AccumulateGrad node belongs to, or None for other nodes."""
    leaf: Tensor | None = getattr(node, "variable", None)
    return leaf


def by_batch_statistics(node: Any) -> bool:
    """Whether a normalisation node's statistics are those of its rows (it saves that flag)."""
    return bool(getattr(node, "_saved_training", False) or getattr(node, "_saved_train", False))


# Private: whether hooks keep what graphs save, as activation checkpointing does. Torch only says
# how to add and forbid such hooks, not whether there are any.
saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """Return where a module keeps its hooks. Private: no public name lists them."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [getattr(module, name) for name in names]


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep gradient hooks of the tensors quiet: they are to run when the whole gradient is there.

    Private: torch lists a tensor's hooks nowhere else.
    """
    hooks: Iterable[dict[int, Any]] = [t._backward_hooks for t in tensors if t._backward_hooks]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


def out_of_inference(value: T) -> T:
    """Replace tensors that were made in inference mode, which no graph may hold, by copies."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.clone() if value.is_inference() else value
    elif type(value) in (tuple, list):
        found = type(found)(map(out_of_inference, found))
    elif type(value) is dict:
        found = {name: out_of_inference(each) for name, each in found.items()}
    return found  # type: ignore[no-any-return]  # of the type that came in
