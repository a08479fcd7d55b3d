"""What the terms of a prior say while it is evaluated, for a training framework's logger."""

import re
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors.priors.base import Prior, Term

TOTAL, RATIO = "prior", "prior_gradient_ratio"


def terms_of(prior: Prior) -> dict[str, Prior]:
    """Return what is logged of a prior, under keys that every logger takes.

    These are its terms, which are no combinations of others, and combinations that have a name. A
    key is ``prior/`` and the name, or else the class, numbered from the second of a kind on.
    """
    terms: dict[str, Prior] = {}
    inside_others: set[nn.Module] = set()  # the sides of an agreement
    for module in prior.modules():
        if not isinstance(module, Prior) or module in inside_others:
            continue
        if isinstance(module, Term):
            inside_others |= {*module.modules()}
        within = any(isinstance(m, Prior) for m in module.modules() if m is not module)
        if within and module.name is None and not isinstance(module, Term):
            continue
        word = type(module).__name__ if module.name is None else module.name
        key = stem = f"{TOTAL}/" + re.sub(r"\W+", "_", word).strip("_")
        times = 1
        while key in terms:
            times += 1
            key = f"{stem}_{times}"
        terms[key] = module
    return terms


def evaluate(
    prior: Prior, arguments: Mapping[str, Any], trainer: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value of a prior, and detached: the same as ``"prior"``, and each term's own.

    A term's own value carries no weight. What was not evaluated (see ``Lazy``) is not reported.
    Errors about a keyword say that ``prior_arguments`` returns it, where a ``trainer`` has called.
    """
    seen: dict[str, list[Tensor]] = {}
    caller = threading.get_ident()

    def listen(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, value: Tensor) -> None:
            if threading.get_ident() == caller:
                seen.setdefault(name, []).append(value.detach())

        return hook

    with ExitStack() as stack:
        for name, term in terms_of(prior).items():
            stack.callback(term.register_forward_hook(listen(name)).remove)
        try:
            value: Tensor = prior(**arguments)
        except (TypeError, ValueError) as error:
            if trainer is not None:
                _say_who_calls(error, prior, type(trainer).__name__, arguments)
            raise
    each = {name: torch.stack(values).mean() for name, values in seen.items()}
    return value, {TOTAL: value.detach(), **each}


def _say_who_calls(
    error: Exception, prior: Prior, trainer: str, arguments: Mapping[str, Any]
) -> None:
    """Add to an error about a keyword of the prior where keywords come from in a trainer."""
    message = str(error)
    about = re.match(r"`(\w+)|prior .*: expected keywords", message)
    known = {None, "inputs", "baselines", "target", "additional_forward_args", *arguments}
    if about and (about[1] in known or prior.takes(about[1])):
        returned = ", ".join(arguments) or "nothing"
        error.args = (
            f"{message} ({trainer} calls the prior with what `prior_arguments` returns for a "
            f"batch, now {returned}: change it there.)",
        )


class Means:
    """Means of what :func:`evaluate` reported since they were last taken, on the device."""

    def __init__(self, device: torch.device) -> None:
        # All processes use one dtype; MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._none = torch.zeros(2, dtype=dtype, device=device)
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one evaluation; a value that is not finite stays out of the mean of the others."""
        for name, value in values.items():
            pair = torch.stack([value, torch.ones_like(value)]).to(self._none)
            counted = torch.where(value.isfinite(), pair, 0)  # NaN times nothing is NaN
            self._sums[name] = self._sums.get(name, self._none) + counted

    def take(self, prior: Prior, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means of what had a finite value, and start again.

        ``reduce`` sums a tensor over processes, which have the terms of the prior in common.
        """
        names = [TOTAL, *terms_of(prior)]
        table = reduce(torch.stack([self._sums.get(name, self._none) for name in names]))
        self._sums = {}
        return {n: total / k for n, (total, k) in zip(names, table.tolist(), strict=True) if k}
