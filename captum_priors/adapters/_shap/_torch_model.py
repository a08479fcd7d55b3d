"""The torch model behind a SHAP explainer, called with what SHAP passes to its model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._engine._modules import modules_of
from captum_priors._errors import NotDifferentiableError, expected_found

# Single precision on one side, rounding of the same sums on the other.
_AGREE = 1e-4


class TorchModel:
    """A function of arrays (and of tensors where they carry a graph) that returns a tensor.

    Numbers become tensors of the dtype and device of the model's parameters; strings and other
    objects are passed on. A function that SHAP holds itself gets its arrays as SHAP passes them.
    """

    def __init__(self, function: Any, *, converts: bool) -> None:
        self.function = function
        self.converts = converts
        self._shape: str | None = None
        self._parameter = self._first_parameter()

    def _first_parameter(self) -> Tensor | None:
        for module in modules_of(self.function):
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    return parameter
        return None

    def like(self) -> Tensor:
        """Return an empty tensor with the dtype and device of the model's parameters."""
        of = self._parameter
        return torch.empty(0) if of is None else torch.empty(0, dtype=of.dtype, device=of.device)

    def __call__(self, *arguments: Any) -> Tensor:
        """Evaluate on rows; one output for each row, or one row of outputs."""
        if self.converts:
            arguments = tuple(self.convert(a) for a in arguments)
        output = self.function(*arguments)
        if not isinstance(output, Tensor):
            raise TypeError(
                expected_found(
                    "`model`",
                    "one that returns a torch.Tensor",
                    type(output).__name__,
                    "Pass the torch module itself, or a function of tensors.",
                )
            )
        if self._shape == "squeeze":
            output = output.squeeze(-1)
        elif self._shape == "unsqueeze":
            output = output.unsqueeze(-1)
        return output

    def on_rows(self, rows: Any) -> Tensor:
        """Evaluate on a table, however long, in parts that suit the device."""
        table = self.convert(rows) if self.converts else rows
        if not isinstance(table, Tensor):
            return self(rows)
        parts = [self(part) for part in table.split(rows_at_once(table.device))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def numbers(self, *arguments: Any) -> np.ndarray:
        """Evaluate as SHAP's own function: numbers without a graph."""
        with torch.no_grad():
            numbers: np.ndarray = self(*arguments).double().cpu().numpy()
        return numbers

    def convert(self, argument: Any) -> Any:
        """Make a tensor of numbers."""
        like = self.like()
        if isinstance(argument, Tensor):
            return argument.to(like) if argument.is_floating_point() else argument.to(like.device)
        array = as_array(argument)
        if array.dtype.kind == "f":
            return torch.tensor(np.ascontiguousarray(array)).to(
                like
            )  # a copy: SHAP reuses its buffers
        if array.dtype.kind in "iub":
            return torch.tensor(np.ascontiguousarray(array)).to(like.device)
        return argument

    def agree(self, stock: Any, arguments: Sequence[Any]) -> None:
        """Require that SHAP's function says the same as the torch model, once."""
        if stock is self.function:
            return
        with torch.no_grad():
            theirs = _numbers(stock(*arguments))
            ours = self.numbers(*arguments)
        if ours.shape != theirs.shape:
            if ours.shape == (*theirs.shape, 1):
                self._shape, ours = "squeeze", ours[..., 0]
            elif theirs.shape == (*ours.shape, 1):
                self._shape, ours = "unsqueeze", ours[..., None]
            else:
                raise ValueError(
                    expected_found(
                        "`model`",
                        f"outputs of shape {theirs.shape} as from the function that SHAP holds",
                        f"{ours.shape}",
                        "Pass the torch model that this function wraps, its last step included.",
                    )
                )
        scale = max(float(np.abs(theirs).max(initial=0)), 1e-12)
        difference = float(np.abs(ours - theirs).max(initial=0))
        if not difference <= _AGREE * scale:
            raise ValueError(
                expected_found(
                    "`model`",
                    "the outputs of the function that SHAP holds, on the background",
                    f"a difference of {difference:.3g} in outputs of up to {scale:.3g}",
                    "Pass the torch model that this function wraps: a softmax or a chosen output "
                    "belongs to it, too.",
                )
            )


def rows_at_once(device: torch.device) -> int:
    """Return how many rows go through the model at once.

    On a CPU what stays in its cache from one layer of a small model to the next, elsewhere what
    keeps the device busy.
    """
    return 1 << 13 if device.type == "cpu" else 1 << 16


def as_array(argument: Any) -> Any:
    """Return the numbers in an array, DataFrame or sparse matrix."""
    if hasattr(argument, "toarray"):
        return argument.toarray()
    return np.asarray(argument)


def _numbers(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach().double().cpu().numpy()
    return np.asarray(output, dtype=float)


def torch_model_behind(held: Any, given: Any) -> TorchModel | None:
    """Find the torch model: what the user gave, or what SHAP holds where that is torch already.

    Args:
        held: SHAP's model: a function, a module, or one of SHAP's wrappers of them.
        given: What the user passed as ``model``, or None.
    """
    if given is not None:
        if not callable(given):
            raise TypeError(
                expected_found(
                    "`model`",
                    "a torch module or a function that returns a tensor",
                    type(given).__name__,
                    "Pass the model that SHAP's function wraps.",
                )
            )
        return TorchModel(given, converts=True)
    function = stock_function(held)
    if isinstance(function, nn.Module):
        return TorchModel(function, converts=True)
    return None


def returns_tensors(function: Any, arguments: Sequence[Any]) -> TorchModel | None:
    """Take SHAP's own function as the torch model if it answers arrays with a graph."""
    with torch.enable_grad():
        output = function(*arguments)
    if isinstance(output, Tensor) and output.requires_grad:
        return TorchModel(function, converts=False)
    return None


def stock_function(held: Any) -> Any:
    """Take off SHAP's wrappers of the model."""
    for name in ("inner_model", "f"):
        if type(held).__module__.startswith("shap.") and hasattr(held, name):
            return stock_function(getattr(held, name))
    return held


def no_torch_model(name: str) -> NotDifferentiableError:
    """Word the error for an explainer of a function without a graph."""
    return NotDifferentiableError(
        expected_found(
            f"`model` of {name}",
            "the torch model behind the function that SHAP holds",
            "none, and a function whose answers have no graph",
            "Write differentiable(explainer, model=net), with the module or a function of tensors.",
        )
    )
