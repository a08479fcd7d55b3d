"""What the terms of a prior say while it is evaluated, for a training framework's logger."""

import re
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from captum_priors.priors.base import Prior

TOTAL, RATIO = "prior", "prior_gradient_ratio"


def terms_of(prior: Prior) -> dict[str, Prior]:
    """Return the terms that are no combination of others, under names that every logger takes.

    A name is made of the formula without its weights and tensors, so that runs with others compare.
    """
    terms: dict[str, Prior] = {}
    for module in prior.modules():
        inside = [m for m in module.modules() if m is not module]
        if isinstance(module, Prior) and not any(isinstance(m, Prior) for m in inside):
            formula = re.sub(r"(, )?\w+=\.\.\.", "", module.formula())
            name = stem = f"{TOTAL}/" + re.sub(r"\W+", "_", formula).strip("_")
            times = 1
            while name in terms:
                times += 1
                name = f"{stem}_{times}"
            terms[name] = module
    return terms


def evaluate(prior: Prior, arguments: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value of a prior, and detached: the same as ``"prior"``, and each term's own.

    A term's own value carries no weight. What was not evaluated (see ``Lazy``) is not reported.
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
        value: Tensor = prior(**arguments)
    each = {name: torch.stack(values).mean() for name, values in seen.items()}
    return value, {TOTAL: value.detach(), **each}


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
