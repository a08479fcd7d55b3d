"""Images to train on: scikit-learn's digits, or MNIST read from IDX files."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from captum_priors._demo import UsageError
from captum_priors._demo.base import Examples


def digits(_: Path | None = None) -> tuple[Examples, Examples]:
    """Training and test images ``(n, 1, 16, 16)`` in [0, 1] with labels, always split alike."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 16
    # Twice as fine: at 8 x 8 neighbouring pixels have too little to do with each other.
    return split(F.interpolate(images, scale_factor=2, mode="bilinear"), labels, 500)


def mnist(folder: Path) -> tuple[Examples, Examples]:
    """Training and test images ``(n, 1, 28, 28)`` in [-1, 1] with labels, from MNIST's test set."""
    pixels = _read(folder / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = _read(folder / "t10k-labels-idx1-ubyte.gz", 8)
    if len(pixels) != len(labels):
        raise UsageError(f"--data: expected {len(pixels)} labels in {folder}, found {len(labels)}")
    images = torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1
    return split(images, labels, len(images) // 5)


def split(images: torch.Tensor, labels: np.ndarray, n_test: int) -> tuple[Examples, Examples]:
    """Return training and test examples."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    targets = torch.from_numpy(labels.astype(np.int64))
    train, test = ((images[rows], targets[rows]) for rows in (order[n_test:], order[:n_test]))
    return train, test


def _read(path: Path, header: int) -> np.ndarray:
    try:
        values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
        return values.reshape(-1, 784) if header == 16 else values
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"--data: cannot read {path} ({error}); download it again") from None
