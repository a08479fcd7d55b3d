"""Holds and replays that overlap leave the module as the first of them found it."""

import torch
from torch import nn

from captum_priors._engine._still import ModuleState, claimed, held


def test_every_order_of_leaving() -> None:
    for first_out in (0, 1):
        module = nn.BatchNorm1d(3)
        mean = module.running_mean
        recorded = ModuleState.of(module)
        blocks = [held([module]), claimed([(module, recorded)])]
        for block in blocks:
            block.__enter__()
        blocks[first_out].__exit__(None, None, None)
        # The remaining one rules: still for the hold, the recorded train mode for the replay.
        assert module.training is (first_out == 0)
        assert module.running_mean is not mean
        blocks[1 - first_out].__exit__(None, None, None)
        assert module.training
        assert module.running_mean is mean


def test_statistics_are_copies_while_held() -> None:
    module = nn.BatchNorm1d(3)
    mean = module.running_mean.clone()
    with held([module]):
        module.running_mean.add_(1)
    assert torch.equal(module.running_mean, mean)
