"""Options that constructors hand on to :class:`Term`, and terms with and without an annotation.

``Term`` declares the options and their defaults. A constructor that has nothing of its own to do
with them takes ``**options: Unpack[TermOptions]``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

from typing_extensions import Unpack

from captum_priors._checks import check_forward_func
from captum_priors._errors import refusal
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
        _refuse_others(self, options, TermOptions)  # Term would take ``missing``
        super().__init__(explained, **options)


class Annotated(Term):
    """A term on a model's function that is told of each example where something is."""

    _annotation: ClassVar[str]

    def __init__(self, forward_func: Any, **options: Unpack[AnnotatedOptions]) -> None:
        _refuse_others(self, options, AnnotatedOptions)
        check_forward_func(forward_func)
        super().__init__(forward_func, **options)

    def takes(self, name: str) -> bool:
        """Whether a call may pass this keyword."""
        return name == "annotation" or super().takes(name)

    def _check_call(
        self, inputs: Any, baselines: Any, target: Any, annotations: dict[str, Any]
    ) -> None:
        super()._check_call(inputs, baselines, target, annotations)
        if annotations.get("annotation") is None:
            raise refusal(
                TypeError,
                "`annotation`",
                self._annotation,
                "none",
                "Pass annotation=..., one entry for each example of the batch.",
            )


def _refuse_others(term: Term, options: Mapping[str, Any], declared: type) -> None:
    """Refuse what is no option: ``Unpack`` speaks to type checkers alone."""
    for name in options.keys() - declared.__annotations__.keys():
        made = f"{type(term).__name__}.__init__()"
        raise TypeError(f"{made} got an unexpected keyword argument {name!r}")
