"""Priors inside distributed training and training frameworks.

On several processes (``torchrun``), explain the module and train through its wrapper, in one
backward pass::

    ddp = DistributedDataParallel(model)
    prior = AcrossProcesses(0.1 * AttributionPrior(ExpectedGradients(model), penalty), ddp)
    loss = F.cross_entropy(ddp(x), y)
    (loss + prior(x, baselines=x, target=y)).backward()

:mod:`~captum_priors.integrations.fsdp` has what ``fully_shard`` needs in its place, and
:func:`check_synchronised` tells whether processes have drifted apart. What a framework needs lives
in a module of its own name, which is imported with the framework and never without it.
:class:`StepGuard` works with each of them and keeps gradients that are not finite out of the
parameters.
"""

from captum_priors.integrations.processes import AcrossProcesses, check_synchronised
from captum_priors.integrations.step_guard import StepGuard

__all__ = ["AcrossProcesses", "StepGuard", "check_synchronised"]
