"""Images to train on: scikit-learn's digits, or MNIST read from IDX files."""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class UsageError(Exception):
    """The demo was called wrongly: shown as one line, and nothing has been written."""


@dataclass(frozen=True)
class Images:
    """Images ``(n, 1, height, width)`` in [-1, 1] with labels, split once and for all."""

    name: str
    split: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(spec: str) -> Images:
    """Load ``digits`` or ``mnist=DIR``."""
    kind, _, folder = spec.partition("=")
    if spec == "digits":
        from sklearn.datasets import load_digits  # a second's import that MNIST does not need

        pixels, labels = load_digits(return_X_y=True)
        name, n_test = "scikit-learn digits, 16 x 16", 500
        images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 8 - 1
        # Twice as fine: at 8 x 8 neighbouring pixels have too little to do with each other.
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
    elif kind == "mnist" and folder:
        pixels, labels = (
            _read_idx(Path(folder), f"t10k-{what}-ubyte") for what in ("images-idx3", "labels-idx1")
        )
        name, n_test = "MNIST t10k", len(pixels) // 5
        images = torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1) / 127.5 - 1
    else:
        raise UsageError(f"--data: expected 'digits' or 'mnist=DIR', found {spec!r}")
    if len(images) != len(labels):
        raise UsageError(f"--data: expected {len(images)} labels in {folder}, found {len(labels)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = f"{len(order) - n_test} training and {n_test} test images of {len(order)}, fixed random"
    targets = torch.from_numpy(labels.astype(np.int64))
    train, test = ((images[rows], targets[rows]) for rows in (order[n_test:], order[:n_test]))
    return Images(name, f"{split} split", train, test)


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
