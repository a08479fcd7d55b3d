"""Priors in Accelerate: a prior beside what ``accelerator.prepare`` returns."""

from typing import Any

from torch import Tensor

from captum_priors.integrations._terms import Means, evaluate
from captum_priors.priors.base import Prior
from captum_priors.priors.combined import Wrapper

__all__ = ["AcceleratedPrior"]


class AcceleratedPrior(Wrapper):
    r"""A prior whose state ``accelerator.save_state`` keeps and whose terms it logs.

    Make it from the model as it was before ``accelerator.prepare``, and add it to the loss that
    ``accelerator.backward`` gets, which divides both by the steps of accumulation. :meth:`log`
    sends the means since its last call, over all processes, to the trackers: ``"prior"``, and each
    term's own value without its weight as ``"prior/<term>"``.

    Args:
        prior: The prior.
        accelerator: The accelerator that trains the model.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from captum_priors.integrations.accelerate import AcceleratedPrior
        >>> from captum_priors.priors import PixelPrior
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
        >>> prior = AcceleratedPrior(0.1 * PixelPrior(net, baselines=x), accelerator)
        >>> loader = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=3)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        >>> for inputs, target in loader:
        ...     with accelerator.accumulate(model):
        ...         loss = torch.nn.functional.cross_entropy(model(inputs), target)
        ...         accelerator.backward(loss + prior(inputs, target=target))
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> sorted(prior.log(step=1))
        ['prior', 'prior/PixelPrior']
    """

    def __init__(self, prior: Prior, accelerator: Any) -> None:
        super().__init__(prior)
        self.to(accelerator.device)
        self.accelerator, self._means = accelerator, Means(accelerator.device)
        accelerator.register_for_checkpointing(self.prior)

    def forward(self, *data: Any, **named: Any) -> Tensor:
        """Return the value of the prior, and in a training step keep it for :meth:`log`."""
        names = ("inputs", "baselines", "target", "additional_forward_args")
        value, values = evaluate(self.prior, {**dict(zip(names, data, strict=False)), **named})
        if self.training_step():
            self._means.add(values)
        return value

    def log(self, step: int | None = None, **log_options: Any) -> dict[str, float]:
        """Send the means since the last call to the trackers, as ``Accelerator.log`` does.

        Every process has to call it, and is given them.
        """
        means = self._means.take(self.prior, self.accelerator.reduce)
        self.accelerator.log(means, step=step, **log_options)
        return means
