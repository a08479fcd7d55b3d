"""Priors on modules that ``torch.distributed.fsdp.fully_shard`` has sharded (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.engine.processes import unsharded_now

__all__ = ["unsharded"]


@contextmanager
def unsharded(model: nn.Module, *, synchronise: bool = True) -> Iterator[None]:
    r"""Keep the parameters of a sharded model whole for a backward pass with a prior in it.

    The gradient of a prior runs through that of the inputs, whose graph needs whole parameters;
    ``fully_shard`` frees them when a backward pass leaves a module, and so before it comes back.
    They are gathered once more and kept to the end of the block, which takes the memory of a model
    that is not sharded. Clip gradients and step the optimizer after the block.

    Evaluate the prior after the model's forward pass, as in the example: its gradients then come
    before ``fully_shard`` collects those of a module. (A prior with ``double_backprop`` may come
    first, too.)

    Args:
        model: The model, or a module that has it.
        synchronise: Whether gradients are averaged over processes in this pass. False for all
            micro-batches of an optimizer's step but the last, in place of
            ``model.set_requires_gradient_sync``.

    Raises:
        NotDifferentiableError: After a pass in which gradients came too late and were left behind.
            A prior's backward pass outside of the block raises it, too.

    Example:
        The step on each process, after ``fully_shard(model)``::

            loss = F.cross_entropy(model(x), y)
            loss = loss + prior(x, target=y)
            with unsharded(model):
                loss.backward()
            optimizer.step()
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_requires_gradient_sync(synchronise, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    unsharded_now.update(sharded)
    try:
        yield
    finally:
        unsharded_now.difference_update(sharded)
        whole = dict(model.named_parameters())
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()
        # What was not collected stays where it was, and would be in the next step.
        stored = model.named_parameters() if synchronise else ()
        gathered = [name for name, parameter in stored if parameter is not whole[name]]
        left_behind = [name for name in gathered if whole[name].grad is not None]
        for name in left_behind:
            whole[name].grad = None
    if left_behind:
        raise refusal(
            NotDifferentiableError,
            "backward pass of a prior",
            "its gradients before fully_shard collects those of the module",
            f"that those of {', '.join(left_behind)} came later",
            "Evaluate the prior after the model's forward pass: loss = "
            "F.cross_entropy(model(x), y); loss = loss + prior(x, target=y).",
        )
