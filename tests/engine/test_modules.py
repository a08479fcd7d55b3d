"""Modules are found wherever a callable keeps them."""

import functools
from typing import Any

import pytest
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from captum_priors._engine._modules import modules_of, submodules_of

GLOBAL = nn.Linear(1, 1)


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.parts = {"model": [model]}

    def method(self, x: Tensor) -> Any:
        return self.parts["model"][0](x)

    def __call__(self, x: Tensor) -> Any:
        return self.method(x)


def test_module_itself_and_its_submodules() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    assert modules_of(model) == (model,)
    assert submodules_of(model, model) == (model, model[0], model[1])


@pytest.mark.parametrize(
    "hide",
    [
        lambda m: lambda x: m(x),
        lambda m: lambda x, m=m: m(x),
        lambda m: m.forward,
        lambda m: functools.partial(lambda model, x: model(x), m),
        lambda m: functools.partial(lambda x, model: model(x), model=m),
        lambda m: Holder(m),
        lambda m: Holder(m).method,
        lambda m: ExpectedGradients(lambda x: m(x)),
        lambda m: functools.wraps(m.forward)(lambda x: m(x)),
        lambda m: lambda x: (lambda y: m(y))(x),
    ],
)
def test_hidden_module_is_found(hide: Any) -> None:
    model = nn.Linear(1, 1)
    assert modules_of(hide(model)) == (model,)


def test_global_module_is_found_and_unrelated_ones_are_not() -> None:
    def function(x: Tensor) -> Any:
        return GLOBAL(x)

    assert modules_of(function) == (GLOBAL,)
    assert modules_of(lambda x: x.GLOBAL) == ()


def test_cycles_and_unbound_names_end() -> None:
    holder: list[Any] = []
    holder.append(holder)
    assert modules_of(holder) == ()

    def outer() -> Any:
        def inner() -> Any:
            return later

        found = modules_of(inner)
        later = GLOBAL
        return found, modules_of(inner), later

    found, after, _ = outer()
    assert found == ()
    assert after == (GLOBAL,)
