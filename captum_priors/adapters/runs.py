"""Captum's layer methods on a layer that runs once for each of several inputs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from captum.attr import LayerAttribution, LayerIntegratedGradients
from torch import Tensor, nn

from captum_priors._captum import forward_args
from captum_priors._errors import refusal
from captum_priors.attr.layers import Layer, runs_error
from captum_priors.engine.random import GlobalState


class RunsAgain(Exception):  # noqa: N818  # ends an attribution, and is no error
    """A layer runs a second time in the forward pass, under one hook of Captum's."""


class Runs:
    """A module for each of the runs of a layer, through which passes what it returns there."""

    def __init__(self, layer: Layer, n: int) -> None:
        self.layer, self.modules = layer, [nn.Identity() for _ in range(n)]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Pass what each run returns (or receives) through its module."""
        turns, last = cycle(self.modules), self.modules[-1]

        def turn(found: Any) -> Any:
            nonlocal last
            last = next(turns)
            return last(found[0] if self.layer.to_input and len(found) == 1 else found)

        with self.layer.hooked(turn):
            yield
        if last is not self.modules[-1]:
            raise runs_error("other numbers of runs than at the whole batch")


def may_run_apart(explainer: Any, layer: nn.Module) -> bool:
    """Whether the runs of a layer can be explained apart: it is the one that is explained."""
    return isinstance(explainer, LayerAttribution) and explainer.layer is layer


def attribute_runs(explainer: Any, given: dict[str, Any], tensors: tuple[Tensor, ...]) -> Any:
    """Return a tuple, one entry for each run; None where one of the runs feeds another.

    A path in the layer's space is that of all its runs; others explain one run after another, with
    the same draws.
    """
    given = dict(given)
    to_input = bool(given.pop("attribute_to_layer_input", False))
    args = forward_args(given.get("additional_forward_args"))
    layer = Layer(explainer.forward_func, explainer.layer, to_input)
    n = layer.runs_apart(tensors, args)
    if n is None:
        return None
    runs, delta = Runs(layer, n), given.get("return_convergence_delta")
    if isinstance(explainer, LayerIntegratedGradients):
        found = _with_layer(explainer, runs, [*runs.modules])._attribute_once(given, tensors)
        return (tuple(found[0]), found[1]) if delta else tuple(found)
    if delta:
        raise refusal(
            ValueError,
            "`return_convergence_delta`",
            "False where a layer runs for several inputs",
            f"True for {n} runs",
            "The attributions of all runs together make up the difference of the outputs.",
        )
    state, found = GlobalState.now(explainer.draws), []
    for module in runs.modules:
        state.restore()
        found.append(_with_layer(explainer, runs, module)._attribute_once(given, tensors))
    return tuple(found)


def _with_layer(explainer: Any, runs: Runs, layer: Any) -> Any:
    twin = copy.copy(explainer)
    twin.layer, twin.runs = layer, runs
    return twin
