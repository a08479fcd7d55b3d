"""Full precision in float32: without TF32, which cuDNN's convolutions have by default."""

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has another spelling, from 2.9 on
        before = [owner.allow_tf32 for owner in owners]
        for owner in owners:
            owner.allow_tf32 = False
        yield
        for owner, allowed in zip(owners, before, strict=True):
            owner.allow_tf32 = allowed
