"""What the terms of a prior say while it is evaluated, for a training framework's logger."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._engine._modules import modules_of
from captum_priors._errors import expected_found
from captum_priors.priors._base import Prior
from captum_priors.priors._guarded import Guarded

TOTAL = "prior"
SKIPPED = "prior/skipped"


def terms_of(prior: Prior) -> dict[str, Prior]:
    """Return the terms that are no combination of others, under names that every logger takes.

    A name is made of the formula without its weights, so that runs with other weights compare.
    """
    terms: dict[str, Prior] = {}
    for module in prior.modules():
        if not isinstance(module, Prior) or any(
            isinstance(m, Prior) for m in module.modules() if m is not module
        ):
            continue
        name = stem = f"{TOTAL}/" + re.sub(r"\W+", "_", module.formula()).strip("_")
        times = 1
        while name in terms:
            times += 1
            name = f"{stem}_{times}"
        terms[name] = module
    return terms


@contextmanager
def _listening(terms: Mapping[str, Prior], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect what terms return in this thread."""
    owner = threading.get_ident()

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: Any, value: Tensor) -> None:
            if threading.get_ident() == owner:
                seen.setdefault(name, []).append(value.detach())

        return hook

    handles = [term.register_forward_hook(listen(name)) for name, term in terms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def evaluate(prior: Prior, arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value of a prior, and detached: the same as ``"prior"``, and each term's own.

    A term's own value carries no weight. What was not evaluated (see ``Lazy``) is not reported.
    Where ``Guarded`` stands in the prior, ``"prior/skipped"`` is 1 if it skipped, else 0.
    """
    if not isinstance(arguments, Mapping) or "inputs" not in arguments:
        found = list(arguments) if isinstance(arguments, Mapping) else type(arguments).__name__
        raise TypeError(
            expected_found(
                "`prior_arguments`",
                "a dict of the prior's keywords with 'inputs' in it",
                str(found),
                "Return for example {'inputs': x, 'target': y}.",
            )
        )
    seen: dict[str, list[Tensor]] = {}
    guards = _guards(prior)
    skips = [int(guard.skips) for guard in guards]
    with _listening(terms_of(prior), seen):
        value: Tensor = prior(**arguments)
    each = {name: torch.stack(values).mean() for name, values in seen.items()}
    if guards:
        now = [int(guard.skips) for guard in guards]
        each[SKIPPED] = torch.tensor(float(now != skips), device=value.device)
    return value, {TOTAL: value.detach(), **each}


def _guards(prior: Prior) -> list[Guarded]:
    return [module for module in prior.modules() if isinstance(module, Guarded)]


class Means:
    """Means of what :func:`evaluate` reported since they were last taken, on the device."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one evaluation; a value that is not finite stays out of the mean of the others."""
        for name, value in values.items():
            number = value.to(torch.promote_types(value.dtype, torch.float32))
            counted = number.isfinite()
            pair = torch.stack([torch.where(counted, number, 0), counted.to(number.dtype)])
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def take(
        self, prior: Prior, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """Return the means over all processes and start again; nan where no value was finite.

        Args:
            prior: The prior, whose terms are the same in every process.
            reduce: Sums a tensor over processes.
        """
        names = [TOTAL, *terms_of(prior), *([SKIPPED] if _guards(prior) else [])]
        like = next(iter(self._totals.values()), torch.zeros(2))
        rows = [self._totals.get(name, torch.zeros_like(like)) for name in names]
        seen = torch.tensor([name in self._totals for name in names], device=like.device)
        table = torch.cat([torch.stack(rows), seen.unsqueeze(1).to(like.dtype)], 1)
        self._totals = {}
        sums, counts, seens = (table if reduce is None else reduce(table)).unbind(1)
        means = (sums / counts).tolist()
        return {n: mean for n, mean, s in zip(names, means, seens.tolist(), strict=True) if s}


def shared_table(table: Tensor, device: torch.device) -> Tensor:
    """Put a table where processes sum it, in the dtype that all of them use."""
    # MPS has no float64.
    return table.to(torch.float32 if device.type == "mps" else torch.float64).to(device)


def check_explains(prior: Prior, model: nn.Module) -> None:
    """Refuse a prior on another model than the one that is trained: it would change nothing."""
    behind = modules_of(*(value for m in prior.modules() for value in vars(m).values()))
    own = {id(p) for p in prior.parameters()}
    explained = {id(p) for m in behind for p in m.parameters()} - own
    trained = {id(p) for p in model.parameters()}
    if explained and not explained & trained:
        raise ValueError(
            expected_found(
                f"prior {prior!r}",
                "an explainer of the model that is trained",
                "one of a model that shares no parameter with it",
                "Make the prior from that model, or pass a function that makes it: "
                "prior=lambda model: ...",
            )
        )
