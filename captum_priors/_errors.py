"""The package's one exception of its own, and the wording of errors that several files raise."""

from collections.abc import Sequence


class NotDifferentiableError(RuntimeError):
    r"""Raised where an attribution cannot be given a correct parameter gradient.

    Example:
        >>> import torch
        >>> from captum.attr import LRP
        >>> from captum_priors import NotDifferentiableError, differentiable
        >>> try:
        ...     differentiable(LRP(torch.nn.Linear(3, 1)))
        ... except NotDifferentiableError as error:
        ...     "LRP" in str(error)
        True
    """


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
