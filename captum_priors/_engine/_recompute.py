r"""Train on a sum of many terms in the memory of one.

An attribution that averages over samples or path steps is a sum :math:`A = \sum_c A_c(x, \theta)`,
and so is its pullback: :math:`\nabla_\theta\langle v, A\rangle = \sum_c \nabla_\theta\langle v,
A_c\rangle`. The forward pass keeps no graph; the backward pass evaluates one term at a time with
its graph, pulls the cotangent through it and lets it go. Exact, at the price of a second pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_priors._engine._first_order import without_graph
from captum_priors._engine._independence import refuse_coupled_examples
from captum_priors._engine._replay import Conditions
from captum_priors._engine._surrogate import accumulate, pull, with_pullback
from captum_priors._errors import NotDifferentiableError


class Visit(Protocol):
    """Receives each term of the sum, and the rows of the output that it adds to."""

    def __call__(self, term: tuple[Tensor, ...], rows: slice = ...) -> tuple[Tensor, ...]:
        """Return the term as the program is to go on with it."""


Program = Callable[[tuple[Tensor, ...], Visit], tuple[Tensor, ...]]
"""Evaluates the sum from its explicit arguments, passing each term through ``visit``."""

# Forward and backward pass evaluate the same program; nondeterministic GPU kernels reorder sums.
_REPRODUCES = 1e-2


def keep_graph(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
    """Visit that leaves the terms as they are: the sum keeps the graph of all of them."""
    return term


def recompute(
    program: Program, arguments: tuple[Tensor, ...], *, forward_func: Any
) -> tuple[Tensor, ...]:
    """Evaluate a program whose backward pass runs it again, term by term."""
    if not torch.is_grad_enabled():
        return program(arguments, keep_graph)
    conditions = Conditions(forward_func)
    refuse_coupled_examples(conditions.modules, "recompute")
    n_arguments = len(arguments)
    given = tuple(a.detach().requires_grad_(a.requires_grad) for a in arguments)
    with without_graph(returns_with_graph=True) as current:

        def let_go(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
            # Gradients are recorded up to here, so that nothing that a term depends on is missed.
            current.reach(term, given)
            return tuple(t.detach() for t in term)

        values = tuple(v.detach() for v in program(given, let_go))
    conditions.settle()

    def pullback(
        cotangents: Sequence[Tensor], sources: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        given = tuple(sources[i].detach().requires_grad_(wanted[i]) for i in range(n_arguments))
        total: list[Tensor | None] = [None] * len(sources)

        def visit(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
            weights = [c[rows] for c in cotangents]
            accumulate(total, pull(term, [*given, *sources[n_arguments:]], wanted, weights))
            return tuple(t.detach() for t in term)

        with conditions.again():
            again = program(given, visit)
        for value, repeated in zip(values, again, strict=True):
            _check_reproduced(value, repeated.detach())
        return total

    return with_pullback(values, [*arguments, *current.leaves.values()], pullback)


def _check_reproduced(value: Tensor, repeated: Tensor) -> None:
    difference = (value - repeated).abs().amax() if value.numel() else value.new_zeros(())
    if difference > _REPRODUCES * value.abs().amax():
        raise NotDifferentiableError(
            "recompute: expected the same attributions in the backward pass as in the forward "
            f"pass, found a difference of {float(difference):.3g}. Something outside the model "
            "changed in between; keep it fixed until backward() is over, or use "
            "differentiation='double_backprop'."
        )
