"""Class labels and logits, for the regularizers of classifiers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors.stability._regularizer import Call


def labels_of(call: Call) -> Tensor:
    """Return one class label for each example, on the inputs' device."""
    target = torch.as_tensor(call.target, device=call.inputs[0].device)
    return target.flatten().expand(call.n).long()


def logits_of(outputs: Tensor) -> Tensor:
    """Logits (rows, classes); a single one stands against a class with logit zero."""
    if outputs.shape[1] == 1:
        return torch.cat([torch.zeros_like(outputs), outputs], 1)
    return outputs


def cross_entropies(call: Call, points: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy of each row, whose labels repeat those of the batch."""
    logits = logits_of(call.outputs(points))
    labels = labels_of(call).repeat(len(logits) // call.n)
    highest = int(labels.max())
    if highest >= logits.shape[1] or int(labels.min()) < 0:
        raise ValueError(
            expected_found(
                "`target`",
                f"labels below the {logits.shape[1]} classes of the outputs",
                f"labels from {int(labels.min())} to {highest}",
                "Check which output of the model this is.",
            )
        )
    return F.cross_entropy(logits, labels, reduction="none")
