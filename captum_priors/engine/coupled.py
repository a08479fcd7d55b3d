"""Examples of a batch that influence each other, which stacked points would not be right for."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.engine._torch import Normalisation
from captum_priors.engine.gradients import check_rows
from captum_priors.engine.random import GlobalState


def refuse_coupled_examples(run: Callable[[slice], Tensor], n_examples: int) -> None:
    """Refuse a model whose output for one example depends on the others that go through with it.

    Where points of several examples, or several points of each, go through the model together, such
    outputs would change with what else is there. Checked by running some of the examples alone;
    random models are not judged.

    Args:
        run: The outputs of the given examples.
        n_examples: Number of all.

    Raises:
        NotDifferentiableError: If they differ.
    """
    some = slice(0, max(1, n_examples // 2))
    state = GlobalState.now()
    try:
        every = run(slice(0, n_examples))
        if every.dim() == 0 or len(every) != n_examples:
            check_rows(every, n_examples)
        with other_rows(f"{some.stop} of its examples"):
            alone, again = run(some), run(some)
    finally:
        state.restore()
    together = every[some]
    if together.shape == alone.shape and alone.is_floating_point() and alone.numel():
        # Kernels of other sizes add up in another order.
        eps = torch.finfo(alone.dtype).eps
        tolerance = 1e3 * eps if eps < 1e-5 else 8 * eps
        scale = alone.abs().amax() + together.abs().amax()
        if bool(((together - alone).abs() > tolerance * scale).any()) and torch.equal(alone, again):
            raise _coupled(
                f"outputs of {alone.shape[0]} examples that change by up to "
                f"{float((together - alone).abs().max()):.2g} with the rest of the batch"
            )


@contextmanager
def other_rows(rows: str) -> Iterator[None]:
    """Refuse a model that fails on these rows, after the batch as a whole has gone through."""
    try:
        yield
    except NotDifferentiableError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        found = f"a model that takes the batch as a whole and fails on {rows} ({error})"
        raise _coupled(found) from error


def _coupled(found: str) -> NotDifferentiableError:
    return refusal(
        NotDifferentiableError,
        "`forward_func`",
        "examples that do not influence each other, because their points go through the model "
        "together with others",
        found,
        "Look for BatchNorm in train mode or without running statistics, statistics or graphs over "
        "the batch: a graph is one example if its nodes are a dimension behind the first. An "
        "explainer that takes each example once, such as Saliency or ExpectedGradients with "
        "n_samples=1, with differentiation='double_backprop' takes such models.",
    )


def refuse_batch_statistics(modules: Iterable[nn.Module]) -> None:
    """Refuse BatchNorm in train mode: the examples would not be those of the forward pass."""
    for module in modules:
        if isinstance(module, Normalisation) and module.training:
            raise refusal(
                NotDifferentiableError,
                "a gradient that comes later",
                "examples that do not influence each other",
                f"{type(module).__name__} in train mode",
                "Call model.eval(), use a prior (which holds the model still), or "
                "differentiation='double_backprop'.",
            )
