"""The package's own exceptions, and the wording of errors that several files raise."""

from collections.abc import Sequence


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


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed words."""
    if value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(
            expected_found(f"`{name}`", f"one of {words}", repr(value), "Pass one of these.")
        )
