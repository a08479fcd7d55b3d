"""Priors inside distributed training and training frameworks.

What a framework needs lives in a module of its own name, which is imported with the framework and
never without it. :class:`StepGuard` keeps gradients that have gone wrong out of the parameters, in
each of them.
"""

from captum_priors.integrations._step_guard import StepGuard

__all__ = ["StepGuard"]
