"""Images to train on: scikit-learn's digits, or MNIST read from IDX files."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from captum_priors._demo import UsageError

Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def digits() -> Split:
    """Training and test images ``(n, 1, 16, 16)`` in [0, 1] with labels, always split alike."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 16
    # Twice as fine: at 8 x 8 neighbouring pixels have too little to do with each other.
    return _split(F.interpolate(images, scale_factor=2, mode="bilinear"), labels, 500)


def mnist(folder: Path) -> Split:
    """Training and test images ``(n, 1, 28, 28)`` in [-1, 1] with labels, from MNIST's test set."""
    pixels, labels = (
        _read_idx(folder, f"t10k-{what}-ubyte") for what in ("images-idx3", "labels-idx1")
    )
    if len(pixels) != len(labels):
        raise UsageError(f"--data: expected {len(pixels)} labels in {folder}, found {len(labels)}")
    images = torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1) / 127.5 - 1
    return _split(images, labels, len(images) // 5)


def _split(images: Tensor, labels: np.ndarray, n_test: int) -> Split:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    targets = torch.from_numpy(labels.astype(np.int64))
    train, test = ((images[rows], targets[rows]) for rows in (order[n_test:], order[:n_test]))
    return train, test


def _read_idx(folder: Path, name: str) -> np.ndarray:
    paths = (folder / f"{name}.gz", folder / name)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UsageError(f"--data: expected {name}.gz or {name} in {folder}, found neither")
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
        (n_dims,) = struct.unpack(">xxxB", content[:4])
        start = 4 + 4 * n_dims
        shape = struct.unpack(f">{n_dims}I", content[4:start])
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UsageError(f"--data: cannot read {path} ({error}); download it again") from None
