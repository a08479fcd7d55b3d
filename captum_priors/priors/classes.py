"""Classifiers: logits and labels of the rows of a call, and their cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._errors import refusal
from captum_priors.attacks.ball import Tensors
from captum_priors.priors.base import Call


def logits_of(outputs: Tensor) -> Tensor:
    """Logits (rows, classes); a single one stands against a class with logit zero."""
    if outputs.shape[1] == 1:
        return torch.cat([torch.zeros_like(outputs), outputs], 1)
    return outputs


def logits_and_labels(call: Call, points: Tensors) -> tuple[Tensor, Tensor]:
    """Logits of each row, and its class label, which repeats that of the batch.

    Raises:
        ValueError: If a label is none of the classes.
    """
    logits = logits_of(call.outputs(points, labels=True))
    labels = torch.as_tensor(call.target, device=logits.device).flatten().expand(call.n).long()
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise refusal(
            ValueError,
            "`target`",
            f"labels below the {logits.shape[1]} classes of the outputs",
            f"labels from {int(labels.min())} to {int(labels.max())}",
            "Check which output of the model this is.",
        )
    return logits, labels.repeat(len(logits) // call.n)


def cross_entropies(call: Call, points: Tensors) -> Tensor:
    """Cross entropy of each row."""
    return F.cross_entropy(*logits_and_labels(call, points), reduction="none")
