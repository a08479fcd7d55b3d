"""The package's own exceptions, and the wording of errors that several files raise."""

from collections.abc import Sequence
from typing import TypeVar

E = TypeVar("E", bound=Exception)


class NotDifferentiableError(RuntimeError):
    r"""Raised where an attribution cannot be given a correct parameter gradient.

    Example:
        >>> import torch
        >>> from captum.attr import Attribution
        >>> from captum_priors import NotDifferentiableError, differentiable
        >>> try:
        ...     differentiable(Attribution(torch.nn.Linear(3, 1)))
        ... except NotDifferentiableError as error:
        ...     "abstract" in str(error)
        True
    """


class TargetError(ValueError, AssertionError, IndexError):
    """A target that does not select one output for each example; Captum asserts or indexes."""


def expected_found(what: str, expected: str, found: object, remedy: str) -> str:
    """Word an error in the one form used throughout: expected, found, remedy."""
    return f"{what}: expected {expected}, found {found}. {remedy}"


def refusal(kind: type[E], what: str, expected: str, found: object, remedy: str) -> E:
    """Make an error of that form, to be raised."""
    return kind(expected_found(what, expected, found, remedy))


def type_of(value: object) -> str:
    """Word what was found where another type was expected."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed words."""
    if value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise refusal(ValueError, f"`{name}`", f"one of {words}", repr(value), "Pass one of these.")
