"""Priors inside distributed training and training frameworks.

On several processes (``torchrun``), explain the module and train through its wrapper, in one
backward pass::

    ddp = DistributedDataParallel(model)  # or fully_shard(model)
    prior = AcrossProcesses(0.1 * AttributionPrior(ExpectedGradients(model), penalty))
    loss = F.cross_entropy(ddp(x), y)
    (loss + prior(x, target=y)).backward()

What a framework needs lives in a module of its own name, which is imported with the framework and
never without it.
"""

from captum_priors.integrations._across_processes import AcrossProcesses

__all__ = ["AcrossProcesses"]
