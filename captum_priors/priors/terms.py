"""Options that constructors hand on to :class:`Term`, and terms without an annotation.

``Term`` declares the options and their defaults. A constructor that has nothing of its own to do
with them takes ``**options: Unpack[TermOptions]``.
"""

from typing import Any, TypedDict

from typing_extensions import Unpack

from captum_priors.engine.model import BatchNorm
from captum_priors.priors.annotated import Missing
from captum_priors.priors.base import Reduction, Term


class TermOptions(TypedDict, total=False):
    """Options of every :class:`Term`."""

    reduction: Reduction
    smooth: float | None
    batch_norm: BatchNorm
    name: str | None


class AnnotatedOptions(TermOptions, total=False):
    """Options of a :class:`Term` that takes an annotation."""

    missing: Missing


class Unannotated(Term):
    """A term that takes no annotation, of which none can be missing."""

    def __init__(self, explained: Any, **options: Unpack[TermOptions]) -> None:
        for name in options.keys() - TermOptions.__annotations__.keys():  # Term takes ``missing``
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}")
        super().__init__(explained, **options)
