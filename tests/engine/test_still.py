"""Holding a model still: counted, exact, and undone after an exception."""

import threading

import pytest
from torch import nn

from captum_priors._engine._still import held
from tests.asserts import leaves_no_trace


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2, 2, dropout=0.3))


def test_flags_inside_and_after() -> None:
    net = model()
    net[1].eval()
    with leaves_no_trace(net):
        with held(net.modules()):
            assert not net[0].training
            assert not net[1].training
            # cuDNN cannot differentiate a recurrent module in evaluation mode.
            assert net[2].training
            assert net[2].dropout == 0.0
        assert net[2].dropout == 0.3


def test_undone_after_an_exception() -> None:
    net = model()
    with leaves_no_trace(net), pytest.raises(KeyError), held(net.modules()):
        raise KeyError


def test_overlapping_holders_restore_what_the_first_found() -> None:
    net = model()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with held(net.modules()):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with held(net.modules()):
        thread.start()
        assert inside.wait(10)
    assert not net[0].training  # the other thread still holds it
    leave.set()
    thread.join()
    assert net[0].training


def test_overridden_train_is_not_called() -> None:
    class Frozen(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("not to be called")

    net = Frozen(2, 2)
    with held([net]):
        assert not net.training
    assert net.training
