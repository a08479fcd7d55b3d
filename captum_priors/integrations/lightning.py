"""Priors in Lightning: a mixin for a ``LightningModule``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._errors import refusal, type_of
from captum_priors.integrations._terms import RATIO, TOTAL, evaluate
from captum_priors.priors.base import Prior
from captum_priors.tuning import PriorLog

__all__ = ["PriorMixin"]


class PriorMixin:
    """Add ``self.prior`` to the loss of each training step, and log it.

    Put it before the module that has the ``training_step``, and set ``self.prior``. Accumulation,
    precision, clipping and distributed strategies are Lightning's as ever (``Lazy`` counts
    micro-batches); the prior is a submodule, so its counters travel in the checkpoint.

    Each batch logs ``"prior"``, what is added to the loss, and each term's own value without its
    weight as ``"prior/<term>"``. Validation and test batches log ``"val_prior"`` and
    ``"test_prior"`` in the same way and change no loss, also under ``trainer.validate()``.
    ``prior_on_bar = True`` in the class shows ``"prior"`` on the progress bar.

    With ``log_gradients_every = 100``, on the class or in ``__init__``, each hundredth batch logs
    ``"prior_gradient_ratio"`` (:class:`captum_priors.tuning.PriorLog`), unless a step of your own
    adds the prior.

    A ``training_step`` in the body of the class that lists the mixin comes before it: call
    ``self.prior_loss(batch)`` there, as under manual optimization. A step is never given the prior
    twice, and one that goes without it is refused.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from lightning import LightningModule, Trainer
        >>> from captum_priors.integrations.lightning import PriorMixin
        >>> from captum_priors.priors import PixelPrior
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return F.cross_entropy(self.net(x), y)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> class Smooth(PriorMixin, Classifier):
        ...     def __init__(self, background):
        ...         super().__init__()
        ...         self.prior = 0.1 * PixelPrior(self.net, baselines=background)
        >>> x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
        >>> loader = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=2)
        >>> trainer = Trainer(max_epochs=1, accumulate_grad_batches=3, accelerator="cpu",
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False)
        >>> trainer.fit(Smooth(x), loader)
        >>> trainer.logged_metrics["prior"].item() > 0
        True
    """

    prior: Prior
    log_gradients_every: int = 0
    prior_on_bar: bool = False
    _prior_was_added = False  # in the evaluation of the loss that is under way
    _prior_in_batch = False
    _ratios: PriorLog | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = [c.__name__ for c in cls.__mro__[: cls.__mro__.index(PriorMixin)]]
        if "LightningModule" in before:  # it would take the hooks and not pass them on
            raise refusal(
                TypeError,
                f"bases of {cls.__name__}",
                "PriorMixin before the LightningModule",
                ", ".join(base.__name__ for base in cls.__bases__),
                "Change their order.",
            )

    def prior_arguments(self, batch: Any) -> Mapping[str, Any]:
        """Return the keywords of the prior for a batch, by default of pairs ``(x, y)``.

        Override it for others: ``inputs``, and whatever else the prior is to be given, ``target``,
        ``baselines``, ``additional_forward_args``, annotations.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise refusal(
                TypeError,
                f"{type(self).__name__}: batch",
                "a pair (x, y)",
                f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else type_of(batch),
                "Override prior_arguments(self, batch): return the prior's keywords, such as "
                "{'inputs': x, 'target': y, 'annotation': mask}.",
            )
        inputs, target = batch
        return {"inputs": inputs, "target": target}

    def prior_loss(self, batch: Any, prefix: str = "", **log_options: Any) -> Tensor:
        """Evaluate the prior on a batch and log it: the scalar to add to the loss, shape ``()``.

        Args:
            batch: What the data loader gave.
            prefix: Put before the names that are logged.
            log_options: For ``LightningModule.log_dict``.
        """
        self._prior_was_added = torch.is_grad_enabled()  # looking at a value adds nothing
        self._prior_in_batch |= self._prior_was_added
        arguments = self.prior_arguments(batch)
        value, values = evaluate(self.prior, arguments, self)
        options = {"batch_size": len(as_tuple(arguments["inputs"])[0]), **log_options}
        shown = {"prog_bar": self.prior_on_bar, **options}
        logger: Any = self  # the framework's
        logger.log(prefix + TOTAL, values.pop(TOTAL), **shown)
        logger.log_dict({prefix + name: number for name, number in values.items()}, **options)
        return value

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the step of the module returns, with the prior added to its loss."""
        output = super().training_step(batch, *args, **kwargs)  # type: ignore[misc]  # the framework's
        trains = self.automatic_optimization and torch.is_grad_enabled()  # type: ignore[attr-defined]  # the framework's
        if self._prior_was_added or output is None or not trains:
            return output
        value, returns_more = self.prior_loss(batch), isinstance(output, Mapping)
        loss = output["loss"] if returns_more else output
        self._log_ratio(loss, value)
        return {**output, "loss": loss + value} if returns_more else loss + value

    def _log_ratio(self, loss: Tensor, value: Tensor) -> None:
        if not self.log_gradients_every:
            return
        if self._ratios is None:
            model: Any = self
            self._ratios = PriorLog(model, self.log_gradients_every)
        ratio = self._ratios(loss, value)
        if ratio is not None:
            self.log(RATIO, ratio)  # type: ignore[attr-defined]  # the framework's

    def on_before_backward(self, *args: Any, **kwargs: Any) -> None:
        """End one evaluation of the loss: LBFGS asks for several in one batch."""
        self._prior_was_added = False
        super().on_before_backward(*args, **kwargs)  # type: ignore[misc]  # the framework's

    def on_train_batch_end(self, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse a step that went without the prior."""
        if not self._prior_in_batch and outputs is not None:
            raise refusal(
                RuntimeError,
                f"{type(self).__name__}.training_step",
                "the prior in the loss",
                "a step that PriorMixin does not see and that does not call prior_loss",
                "List PriorMixin before the class that has the step, or add "
                "self.prior_loss(batch) to the loss there.",
            )
        self._prior_was_added = self._prior_in_batch = False
        super().on_train_batch_end(outputs, *args, **kwargs)  # type: ignore[misc]  # the framework's

    def on_validation_batch_end(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        """Log the prior on a batch of the validation set."""
        self.prior_loss(batch, "val_", sync_dist=True)
        super().on_validation_batch_end(outputs, batch, *args, **kwargs)  # type: ignore[misc]  # the framework's

    def on_test_batch_end(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        """Log the prior on a batch of the test set."""
        self.prior_loss(batch, "test_", sync_dist=True)
        super().on_test_batch_end(outputs, batch, *args, **kwargs)  # type: ignore[misc]  # the framework's
