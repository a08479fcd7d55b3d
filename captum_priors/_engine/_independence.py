"""Examples that must not influence each other."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from captum_priors._errors import NotDifferentiableError, expected_found


def refuse_coupled_examples(modules: Iterable[nn.Module], way: str) -> None:
    """Refuse BatchNorm in train mode: the examples would not be those of the forward pass."""
    for module in modules:
        if isinstance(module, _BatchNorm) and module.training:
            raise NotDifferentiableError(
                expected_found(
                    way,
                    "examples that do not influence each other",
                    f"{type(module).__name__} in train mode",
                    "Call model.eval(), use a prior (which holds the model still), or "
                    "differentiation='double_backprop'.",
                )
            )
