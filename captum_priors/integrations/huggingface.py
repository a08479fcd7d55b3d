"""Priors in Hugging Face ``Trainer``: a mixin for it or for any subclass."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._checks import count
from captum_priors._errors import refusal
from captum_priors._extras import extra
from captum_priors.engine import modules_of
from captum_priors.integrations._terms import RATIO, Means, evaluate
from captum_priors.priors.base import Prior
from captum_priors.tuning import PriorLog

__all__ = ["LogitsOf", "PriorTrainerMixin", "classification_arguments"]

logger = logging.getLogger(__name__)


def classification_arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a prior for a batch of sequence or image classification.

    ``input_ids`` or ``pixel_values`` are its ``inputs``, ``labels`` its ``target``; an
    ``attention_mask`` is an additional argument, and so are ``token_type_ids`` after it, which tell
    the sentences of a pair apart. Others need a function of their own.

    Raises:
        ValueError: If the batch has none of these.

    Example:
        >>> import torch
        >>> from captum_priors.integrations.huggingface import classification_arguments
        >>> ids, labels = torch.ones(2, 5, dtype=torch.long), torch.tensor([0, 1])
        >>> list(classification_arguments({"input_ids": ids, "labels": labels}))
        ['inputs', 'target']
        >>> pair = {"input_ids": ids, "labels": labels, "token_type_ids": ids}
        >>> mask, types = classification_arguments(pair)["additional_forward_args"]
        >>> mask is None, types is ids
        (True, True)
    """
    name = "pixel_values" if "pixel_values" in inputs else "input_ids"
    if name not in inputs or "labels" not in inputs:
        raise refusal(
            ValueError,
            "batch",
            "`labels`, and `input_ids` or `pixel_values`",
            ", ".join(inputs) or "nothing",
            "Pass the trainer prior_arguments=..., a function of the batch that returns the "
            "prior's keywords.",
        )
    arguments = {"inputs": inputs[name], "target": inputs["labels"]}
    mask, types = inputs.get("attention_mask"), inputs.get("token_type_ids")
    if types is not None:
        arguments["additional_forward_args"] = (mask, types)
    elif mask is not None:
        arguments["additional_forward_args"] = mask
    return arguments


class LogitsOf:
    """A classifier of ``transformers`` as an explainer calls it: ids and mask in, logits out.

    What comes after the ids is passed by its name. BERT and its like may be explained as they are:
    their second and third arguments are the mask and the token types, and the logits of a module's
    output are found. Others have other arguments there, GPT-2 and XLNet among them.

    Example:
        >>> from types import SimpleNamespace
        >>> from captum_priors.integrations.huggingface import LogitsOf
        >>> LogitsOf(lambda ids, attention_mask: SimpleNamespace(logits=ids * attention_mask))(2, 3)
        6
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, inputs: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        """Return the logits."""
        named = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.model(inputs, **{k: v for k, v in named.items() if v is not None}).logits


class PriorTrainerMixin:
    """Add a prior to the loss of a ``Trainer``, and log it.

    The prior is averaged over the micro-batches of an optimizer step, whether or not the trainer
    divides its loss by their number. (It does not for models whose ``forward`` takes ``**kwargs``,
    although some of these, BERT's classifier among them, return a mean, which is then logged as a
    warning; in transformers 5, ``loss_is_scaled_for_ga = False`` on the trainer's class has it
    divide both.) With the training loss it logs ``"prior"``, what was added on average, and each
    term's own value without its weight as ``"prior/<term>"``.

    Evaluation leaves ``eval_loss`` as it is, so that runs and early stopping compare, and reports
    the metrics ``"eval_prior"`` and ``"eval_prior/<term>"``. Each process saves the prior's
    counters and generators with each checkpoint. A model wrapped by ``DistributedDataParallel`` is
    explained unwrapped, which ``ddp_static_graph`` needs.

    Args:
        args: For the trainer.
        prior: The prior, or a function that makes it from the model (needed with ``model_init``).
        prior_arguments: A function of a batch that returns the prior's keywords. It may ``pop``
            what the model does not take, such as annotations (keep those columns with
            ``remove_unused_columns=False``).
        evaluate_prior: Whether evaluation reports the prior, which takes an explanation's time.
        log_gradients_every: Every so many micro-batches, ``"prior_gradient_ratio"`` is measured
            (:class:`captum_priors.tuning.PriorLog`) and logged with the training loss; 0 for never.
        kwargs: For the trainer.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import Trainer, TrainingArguments
        >>> from captum_priors import AttributionPrior, LayerExpectedGradients
        >>> from captum_priors.integrations.huggingface import LogitsOf, PriorTrainerMixin
        >>> from captum_priors.penalties import l1
        >>> class PriorTrainer(PriorTrainerMixin, Trainer):
        ...     pass
        >>> model = BertForSequenceClassification(BertConfig(
        ...     vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=8))
        >>> def make_prior(model):
        ...     words = model.bert.embeddings.word_embeddings
        ...     explainer = LayerExpectedGradients(LogitsOf(model), words)
        ...     padding = torch.zeros(1, 5, dtype=torch.long)
        ...     return 0.1 * AttributionPrior(explainer, l1, baselines=padding)
        >>> data = [{"input_ids": torch.randint(20, (5,)), "labels": i % 2} for i in range(4)]
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(
        ...         folder, max_steps=1, gradient_accumulation_steps=2, logging_steps=1,
        ...         per_device_train_batch_size=2, save_strategy="no", report_to="none",
        ...         disable_tqdm=True, use_cpu=True)
        ...     trainer = PriorTrainer(model, args, train_dataset=data, prior=make_prior)
        ...     _ = trainer.train()  # doctest: +ELLIPSIS
        {...'prior': ...}
        {...}
    """

    def __init__(
        self,
        *args: Any,
        prior: Prior | Callable[[Any], Prior],
        prior_arguments: Callable[[dict[str, Any]], Mapping[str, Any]] = classification_arguments,
        evaluate_prior: bool = True,
        log_gradients_every: int = 0,
        **kwargs: Any,
    ) -> None:
        self._make_prior: Any = prior
        self._prior_of: tuple[Any, Any] = (None, None)
        self._resumes_from: str | bool | None = None
        self._warned_of_sums = False
        self.prior_arguments, self.evaluate_prior = prior_arguments, evaluate_prior
        self.log_gradients_every = count("log_gradients_every", log_gradients_every, least=0)
        self._ratios: PriorLog | None = None
        self._measured: float | None = None
        super().__init__(*args, **kwargs)
        self._training_means = Means(self.args.device)
        self._evaluation_means = Means(self.args.device)
        _ = self.prior  # what is wrong with it shows now

    # What the trainer that comes after this class has.
    model: nn.Module
    args: Any
    accelerator: Any

    @property
    def prior(self) -> Prior:
        """The prior on the model that is trained."""
        model, prior = self._prior_of
        if model is not self.model:
            made = self._make_prior
            prior = (made if isinstance(made, Prior) else made(self.model)).to(self.args.device)
            _check_explains(prior, self.model)
            self._prior_of = (self.model, prior)
            every = self.log_gradients_every
            self._ratios = PriorLog(self.model, every) if every else None
        found: Prior = prior
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss with the prior where it is trained on, and without it elsewhere."""
        training = torch.is_grad_enabled()
        arguments = self.prior_arguments(inputs)  # label smoothing takes the labels out
        loss, outputs = super().compute_loss(  # type: ignore[misc]  # the framework's
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if training:
            self._warn_of_sums(loss, outputs, arguments, num_items_in_batch)
            self._continue_from_checkpoint()
            value, values = evaluate(self.prior, arguments, self)
            self._training_means.add(values)
            added = value / self._undivided_steps(num_items_in_batch)
            ratio = None if self._ratios is None else self._ratios(loss, added)
            self._measured = self._measured if ratio is None else ratio
            loss = loss + added
        elif self.evaluate_prior:
            self._evaluation_means.add(evaluate(self.prior, arguments, self)[1])
        return (loss, outputs) if return_outputs else loss

    def _warn_of_sums(
        self, loss: Tensor, outputs: Any, arguments: Mapping[str, Any], num_items_in_batch: Any
    ) -> None:
        """Say once that the trainer adds up means, the model's own loss beside the prior's."""
        steps = self._undivided_steps(num_items_in_batch)
        if self._warned_of_sums or steps == 1 or self.args.world_size > 1:
            return
        self._warned_of_sums = True
        logits, labels = getattr(outputs, "logits", None), arguments.get("target")
        if not (isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.dim() == 2):
            return
        if labels.dtype != torch.long or labels.shape != logits.shape[:1]:
            return
        mean = F.cross_entropy(logits.detach().float(), labels)
        # A loss that counts all examples of the step is smaller by their number.
        if torch.isclose(loss.detach().float(), mean, rtol=1e-3):
            logger.warning(
                "%s adds up the losses of %d micro-batches without dividing them, because the "
                "model's forward takes **kwargs; but the model returns their means, so its loss "
                "counts %d times as much as without accumulation, and as the prior does. Set "
                "loss_is_scaled_for_ga = False on the trainer's class (transformers 5), or "
                "trainer.model_accepts_loss_kwargs = False.",
                type(self).__name__,
                steps,
                steps,
            )

    def _undivided_steps(self, num_items_in_batch: Any) -> int:
        """Return the steps of accumulation that the trainer does not divide its loss by."""
        trainer: Any = self
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers 5
        if is_scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = counted or trainer.compute_loss_func is not None
        steps: int = self.args.gradient_accumulation_steps
        return getattr(trainer, "current_gradient_accumulation_steps", steps) if is_scaled else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the prior with the training loss."""
        if "loss" in logs:
            logs.update(self._training_means.take(self.prior, self.accelerator.reduce))
            if self._measured is not None:
                logs[RATIO], self._measured = self._measured, None
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the framework's

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Report the prior as a metric."""
        self._evaluation_means = Means(self.args.device)
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]  # the framework's
        means = self._evaluation_means.take(self.prior, self.accelerator.reduce)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, and in a checkpoint the state of the prior."""
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]  # the framework's
        if output_dir is not None and Path(output_dir).name.startswith("checkpoint-"):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(self.prior.state_dict(), self._state_file(output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; a checkpoint that training resumes from has the state of the prior, too."""
        self._resumes_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]  # the framework's

    def _continue_from_checkpoint(self) -> None:
        """Load the state at the first step: ``model_init`` makes model and prior anew."""
        folder, self._resumes_from = self._resumes_from, None
        if folder is True:
            utils = extra("transformers.trainer_utils", "huggingface")
            folder = utils.get_last_checkpoint(self.args.output_dir)
        if not folder:
            return
        file = self._state_file(folder)
        if file.exists():
            self.prior.load_state_dict(torch.load(file, weights_only=True))
        else:
            logger.warning("There is no %s: the prior starts anew.", file)

    def _state_file(self, folder: Any) -> Path:
        return Path(folder) / f"prior_state_{self.args.process_index}.pt"


def _check_explains(prior: Prior, model: nn.Module) -> None:
    """Refuse a prior on another model than the one that is trained: it would change nothing."""
    behind = modules_of(*(value for m in prior.modules() for value in vars(m).values()))
    explained = {p for m in behind for p in m.parameters()} - set(prior.parameters())
    if explained and explained.isdisjoint(model.parameters()):
        raise refusal(
            ValueError,
            f"prior {prior!r}",
            "an explainer of the model that is trained",
            "one of a model that shares no parameter with it",
            "Make the prior from that model, or pass a function that makes it: "
            "prior=lambda model: ...",
        )
