"""The torch model behind a SHAP explainer, and the numbers that go in and come out of it."""

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._captum import logits_of, output_error, select_error
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.engine import AttributionPass, modules_of, run_modules

_AGREE = 1e-4  # single precision on one side, rounding of the same sums on the other
_STEP = 1e-4  # as SHAP (0.51.0), of the forward difference that linearises the link

Link = Callable[[Tensor], Tensor]
identity: Link = torch.positive  # which returns what it is given


def imported(name: str = "shap") -> Any:
    """Return SHAP, or what it builds on: imported when needed, never with this package."""
    return importlib.import_module(name)


class TorchModel:
    """The torch module, or function of tensors, behind the function that SHAP holds.

    The one rule for dtypes: whatever numbers a table holds, the model gets them in the dtype and on
    the device of its own parameters, or as integers where it takes whole numbers alone (an
    embedding does). Strings and other objects are passed on. What the user passed is compared with
    SHAP's function on a sample, or at the first call.
    """

    def __init__(self, stock: Any, given: Any, sample: Sequence[Any] | None, name: str) -> None:
        self.function = stock if given is None else given
        if not callable(self.function) or (given is None and not isinstance(stock, nn.Module)):
            raise refused(
                f"`model` of {name}",
                "the torch model behind the function that SHAP holds",
                f"a {type(self.function).__name__} that takes and answers arrays",
                "Write differentiable(explainer, model=net), with the module or a function of "
                "tensors.",
            )
        self._stock, self._settled, self._whole = stock, False, False
        self._shape: tuple[int, ...] | None = None
        self._like = _first_float(modules_of(self.function))
        if sample is not None:
            self.settle(sample)

    def settle(self, sample: Sequence[Any]) -> None:
        """See once what dtype the model takes, and that it says what SHAP's function says."""
        if self._settled:
            return
        with AttributionPass(self.function, self._stock), torch.no_grad():
            ours = numbers(self._first_output(sample))
            if self._stock is not self.function:
                self._agree(ours, numbers(self._stock(*sample)))
        self._settled = True

    def _first_output(self, sample: Sequence[Any]) -> Any:
        tables = [a for a in map(as_array, sample) if a.dtype.kind in "fiubO"]
        whole = bool(tables) and all((a == np.round(a)).all() for a in map(numbers, tables))
        first: Exception | None = None
        with run_modules() as seen:
            for self._whole in (False, False, whole):  # a function shows its modules when it runs
                try:
                    return self.once(*sample)
                except (IndexError, RuntimeError, TypeError) as error:
                    first = first or error
                    self._like = _first_float(seen) if seen else self._like
        raise first or AssertionError

    def _agree(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        found = f"outputs of shape {ours.shape} instead of {theirs.shape}"
        if ours.size == theirs.size:  # with or without an axis of one output
            self._shape, ours = theirs.shape[1:], ours.reshape(theirs.shape)
            scale = max(float(np.abs(theirs).max(initial=0)), 1e-12)
            difference = float(np.abs(ours - theirs).max(initial=0))
            if difference <= _AGREE * scale:
                return
            found = f"a difference of {difference:.3g} in outputs of up to {scale:.3g}"
        raise refusal(
            ValueError,
            "`model`",
            "the outputs of the function that SHAP holds, on the background",
            found,
            "Pass the torch model that this function wraps: a softmax or a chosen output "
            "belongs to it, too.",
        )

    def convert(self, argument: Any) -> Any:
        """Make a tensor of numbers, as the model takes them; SHAP reuses its buffers."""
        if not isinstance(argument, Tensor):
            array = as_array(as_numbers(argument))
            if array.dtype.kind not in "fiub":
                return argument
            argument = torch.tensor(np.ascontiguousarray(array))
        return argument.to(self._like.device, torch.int64 if self._whole else self._like.dtype)

    def once(self, *arguments: Any) -> Any:
        """Evaluate on rows as they are, all at once."""
        return logits_of(self.function(*map(self.convert, arguments)))

    def __call__(self, *arguments: Any) -> Tensor:
        """Evaluate on rows, in parts that suit the device; in double precision."""
        given = tuple(map(self.convert, arguments))
        parts = [given]
        if len(given) == 1 and isinstance(given[0], Tensor):
            parts = [(part,) for part in given[0].split(rows_at_once(given[0].device))]
        return torch.cat([self._checked(part) for part in parts])

    def _checked(self, arguments: tuple[Any, ...]) -> Tensor:
        output, n = logits_of(self.function(*arguments)), len(arguments[0])
        if not isinstance(output, Tensor):
            raise select_error(output, None)
        if output.shape[:1] != (n,):
            raise output_error(output, n)
        return output.double() if self._shape is None else output.double().reshape(n, *self._shape)


def _first_float(modules: Sequence[nn.Module]) -> Tensor:
    """Return a tensor of the dtype and device that a model takes."""
    parameters = (p for module in modules for p in module.parameters())
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))


def refused(what: str, expected: str, found: object, remedy: str) -> NotDifferentiableError:
    """Word why something cannot be differentiated."""
    return refusal(NotDifferentiableError, what, expected, found, remedy)


def rows_at_once(device: torch.device) -> int:
    """Return how many rows stay in a CPU's cache between layers, or keep another device busy."""
    return 1 << 13 if device.type == "cpu" else 1 << 16


def stock_function(held: Any) -> Any:
    """Take off SHAP's wrappers of the model."""
    for name in ("inner_model", "f"):  # private: of its Model, and of KernelExplainer's (0.51.0)
        if type(held).__module__.startswith("shap.") and hasattr(held, name):
            return stock_function(getattr(held, name))
    return held


def as_array(argument: Any) -> Any:
    """Return the numbers in a tensor, array, DataFrame or sparse matrix."""
    if isinstance(argument, Tensor):
        return argument.detach().cpu().numpy()
    return argument.toarray() if hasattr(argument, "toarray") else np.asarray(argument)


def as_numbers(rows: Any) -> Any:
    """Give SHAP arrays in place of tensors, and floats in place of booleans and mixed columns."""
    rows = as_array(rows) if isinstance(rows, Tensor) else rows
    if hasattr(rows, "toarray") or np.asarray(rows).dtype.kind not in "bO":
        return rows
    try:
        return rows.astype(float)
    except (AttributeError, TypeError, ValueError):  # strings, for a masker of text
        return rows


def numbers(output: Any) -> np.ndarray:
    """Return numbers of any kind as floats."""
    return np.asarray(as_array(output), dtype=float)


def warn_of_truncation(rows: Any, background: Any) -> None:
    """Say that SHAP itself would not explain these rows, but their whole parts."""
    found = numbers(rows)
    if as_array(background).dtype.kind in "iu" and (found != np.round(found)).any():
        warnings.warn(
            "SHAP writes rows into a copy of the background, which holds integers here, and cuts "
            "off their fractions; this adapter does not. Make the background float to get the same "
            "from both.",
            stacklevel=2,
        )


def torch_link(link: Any, *, clip: float | None = None) -> Link:
    """Return a link, a function or one of KernelExplainer's objects, as a function of tensors."""
    known: dict[str, Link] = {"identity": identity, "logit": partial(torch.logit, eps=clip)}
    name = str(getattr(link, "__name__", link))
    if name not in known:
        raise refused(
            "`link`",
            "shap.links.identity or shap.links.logit",
            name,
            "Make the link the last step of the model and explain with the identity.",
        )
    return known[name]


def linearising_weights(background: Tensor, link: Link) -> Tensor:
    r"""Weights :math:`w_r` of the background rows with mean(w link(p)) = link(mean(p)).

    Of least norm for the link's linearisation at the mean, with SHAP's forward difference as its
    slope.
    """
    mean = background.mean(0)
    centre = link(mean)
    slope = (link(mean + _STEP) - centre) / _STEP
    weights = slope * (background - mean) / (link(background) - centre)
    normalised: Tensor = weights * (weights.shape[0] / weights.sum(0))
    return normalised
