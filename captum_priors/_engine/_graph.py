"""Read autograd graphs: the leaves that they reach, and the operators without a derivative."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from captum_priors._errors import NotDifferentiableError

# Nodes that raise when a second backward pass reaches them. The first two are torch's placeholders
# for "no derivative" and for once-differentiable functions; the others raise only when executed.
_PLACEHOLDERS = {"torch::autograd::NotImplemented", "torch::autograd::Error"}
_DEAD_ENDS = _PLACEHOLDERS | {
    "CompiledFunctionBackwardBackward",
    "CdistBackwardBackward0",
    "CudnnRnnBackwardBackward0",
}
# The Python types of such nodes, and of nodes that have none of their own: quicker than names.
_SUSPECTS = {name.rpartition("::")[2] for name in _DEAD_ENDS} | {"CppFunction"}


def nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Walk the graph behind the tensors, each node once."""
    seen: set[Any] = {None}
    stack: list[Any] = list({tensor.grad_fn for tensor in tensors} - seen)
    seen.update(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)


_LEAF = torch.zeros((), device="cpu", requires_grad=True)


def now() -> int:
    """Mark this moment: nodes made from now on have numbers at least as large in this thread."""
    with torch.enable_grad():
        node: Any = _LEAF.view(()).grad_fn
    return int(node._sequence_nr())


def leaves(tensors: Iterable[Tensor], since: int) -> dict[int, Tensor]:
    """Leaf tensors that the graph behind the tensors reaches, by identity.

    A graph that was made before the given moment is not entered but refused: whoever made it may
    ask for the gradient at any of its tensors, and would not get this part of it.
    """
    tensors = tuple(tensors)
    found = {id(t): t for t in tensors if t.requires_grad and t.grad_fn is None}
    for node in nodes(tensors):
        leaf = getattr(node, "variable", None)  # only AccumulateGrad nodes hold one
        if leaf is not None:
            found[id(leaf)] = leaf
        elif node._sequence_nr() < since and not _casts_a_leaf(node):
            raise NotDifferentiableError(CLOSED_OVER)
    return found


def _casts_a_leaf(node: Any) -> bool:
    """Whether the node is one of those that autocast makes once for each parameter and region."""
    return node.name() == "ToCopyBackward0" and all(
        hasattr(following, "variable") for following, _ in node.next_functions
    )


CLOSED_OVER = (
    "`forward_func`: expected it to depend on leaf tensors and on its inputs, found a tensor with "
    "a graph that was computed before the call or in another thread (an additional argument, a "
    "closed-over tensor, a weight kept by parametrize.cached). Compute it inside forward_func, "
    "detach it if it is a constant, or use differentiation='double_backprop'."
)


def refuse_dead_ends(gradients: tuple[Tensor, ...]) -> None:
    """Raise while the attribution is computed, not when the training loss is differentiated."""
    for node in nodes(gradients):
        if type(node).__name__ in _SUSPECTS and node.name() in _DEAD_ENDS:
            raise NotDifferentiableError(no_second_derivative(_culprit(node, gradients)))


def _culprit(node: Any, gradients: tuple[Tensor, ...]) -> str:
    """Torch names the operator only when the node runs, so run it, on the way to the error."""
    name: str = node.name()
    if name in _PLACEHOLDERS:
        connected = [g for g in gradients if g.requires_grad]
        sources = list(leaves(connected, since=0).values())
        try:
            torch.autograd.grad(
                [g.sum() for g in connected], sources, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return name


def no_second_derivative(culprit: str) -> str:
    """Word the error for an operator without a second derivative."""
    return (
        "double backpropagation: expected every operator of the model to have a second derivative, "
        f"found one that has none ({culprit}). Ways out: differentiation='finite_difference' needs "
        "first derivatives only; for fused attention, run the forward under "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH); for a compiled "
        "module, attribute its eager twin (compiled._orig_mod); for a cuDNN recurrent module, run "
        "the forward under torch.backends.cudnn.flags(enabled=False); for reentrant activation "
        "checkpointing, use_reentrant=False."
    )
