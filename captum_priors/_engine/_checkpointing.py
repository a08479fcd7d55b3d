"""Refuse activation checkpointing where it would run a part of the model under other conditions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from captum_priors._errors import NotDifferentiableError


@contextmanager
def without_checkpointing(reason: str) -> Iterator[None]:
    """Raise when the block records saved-tensor hooks, which run the model again in backward.

    Checkpointed parts then see the training mode, dropout and activations of that later moment,
    and nobody notices that the gradient is that of another network.
    """
    message = (
        "expected a model without activation checkpointing (or other saved-tensor hooks), found "
        f"some: {reason}"
    )
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(message):
            yield
    except RuntimeError as error:
        if str(error) != message:
            raise
        raise NotDifferentiableError(message) from error
