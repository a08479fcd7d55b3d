"""The configurations that Captum tests its own classes with, through the adapters.

Inputs of several tensors, targets of every form, masks, layers in lists, noise tunnels, internal
batches: the adapter says what the stock class says, and leaves no hook.
"""

import copy
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from captum_priors import differentiable
from captum_priors.adapters.captum import ADAPTERS
from tests.adapters.captum_table import flat
from tests.asserts import assert_same_numbers

test_config = pytest.importorskip("captum.testing.attr.helpers.test_config")  # not in every wheel
gen_test_utils = pytest.importorskip("captum.testing.attr.helpers.gen_test_utils")  # nor this

pytestmark = pytest.mark.filterwarnings("ignore")  # Captum's, about its own models
CASES = [
    pytest.param(config, algorithm, id=f"{config['name']}-{algorithm.__name__}")
    for config in test_config.config
    for algorithm in config["algorithms"]
]


def attribute(explainer: Any, call: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  # the generator that Captum draws from
    return explainer.attribute(**copy.deepcopy(call))


@pytest.mark.parametrize(("config", "algorithm"), CASES)
def test_same_numbers(config: dict[str, Any], algorithm: type) -> None:
    torch.set_default_dtype(torch.float32)  # as the models were made; the fixture puts it back
    _, model, call, layer, tunnel, _ = gen_test_utils.parse_test_config(config)
    assert algorithm in ADAPTERS
    model = copy.deepcopy(model)
    where = [] if layer is None else [gen_test_utils.get_target_layer(model, layer)]
    stock = algorithm(model, *where)
    stock = captum.attr.NoiseTunnel(stock) if tunnel else stock
    found = flat(attribute(differentiable(stock), call))
    expected = flat(attribute(stock, call))
    # The same operations in the same order.
    assert_same_numbers(found, tuple(t.detach() for t in expected), 1e-6)
    for module in model.modules():
        assert not any((module._forward_hooks, module._backward_hooks, module._forward_pre_hooks))


# Ours for targets; Captum's own for neurons.
WRONG = "`target`: expected what selects one output|Cannot choose target column"
TARGETED = [
    case
    for case in CASES
    if {"target", "neuron_selector"} & case.values[0]["attribute_args"].keys()
]


@pytest.mark.parametrize(("config", "algorithm"), TARGETED)
def test_wrong_target_leaves_no_hook(config: dict[str, Any], algorithm: type) -> None:
    torch.set_default_dtype(torch.float32)
    _, model, call, layer, tunnel, _ = gen_test_utils.parse_test_config(config)
    wrong = {name: (9999,) * 20 for name in ("target", "neuron_selector") if name in call}
    model = copy.deepcopy(model)
    where = [] if layer is None else [gen_test_utils.get_target_layer(model, layer)]
    explainer = algorithm(model, *where)
    explainer = differentiable(captum.attr.NoiseTunnel(explainer) if tunnel else explainer)
    with pytest.raises((AssertionError, ValueError), match=WRONG):
        attribute(explainer, {**call, **wrong})
    for module in model.modules():
        assert not any((module._forward_hooks, module._backward_hooks, module._forward_pre_hooks))


def test_classes_that_build_on_each_other() -> None:
    """A method that calls the method it is derived from meets the adapter of that, or the stock."""
    x = torch.randn(2, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    deep_lift = differentiable(captum.attr.DeepLift)
    adapter = differentiable(captum.attr.DeepLiftShap(model))
    found = deep_lift.attribute.__wrapped__(adapter, x, target=1)
    expected = captum.attr.DeepLift.attribute.__wrapped__(adapter, x, target=1)
    assert_same_numbers(found.detach(), expected.detach())
