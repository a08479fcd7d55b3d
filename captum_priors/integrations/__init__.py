"""Priors inside distributed training and training frameworks.

On several processes (``torchrun``), explain the module and train through its wrapper, in one
backward pass::

    ddp = DistributedDataParallel(model)  # or fully_shard(model)
    prior = AcrossProcesses(0.1 * AttributionPrior(ExpectedGradients(model), penalty))
    loss = F.cross_entropy(ddp(x), y)
    (loss + prior(x, baselines=x, target=y)).backward()

What a framework needs lives in a module of its own name, which is imported with the framework and
never without it. :class:`StepGuard` works with each of them and keeps gradients that are not finite
out of the parameters.
"""

from captum_priors.integrations._across_processes import AcrossProcesses
from captum_priors.integrations._step_guard import StepGuard

__all__ = ["AcrossProcesses", "StepGuard"]
