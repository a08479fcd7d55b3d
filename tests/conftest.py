"""Fixtures for every test: fixed seeds, float64, and where the real data is."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed the generators and compute in float64, where rounding cannot hide a wrong gradient."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def mnist() -> Path:
    """Folder with the four-part MNIST test set in IDX files; set CAPTUM_PRIORS_MNIST to use it."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "mnist"
    folder = Path(os.environ.get("CAPTUM_PRIORS_MNIST", beside))
    if not (folder / "t10k-images-idx3-ubyte.gz").exists():
        pytest.skip("real MNIST is not at hand: set CAPTUM_PRIORS_MNIST to a folder that has it")
    return folder
