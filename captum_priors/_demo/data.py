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

from captum_priors._demo.errors import UsageError

_SPLIT_SEED = 0
_MNIST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Images:
    """Images ``(n, 1, height, width)`` in [-1, 1] with labels, split once and for all."""

    name: str
    split: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(spec: str) -> Images:
    """Load ``digits`` or ``mnist=DIR``."""
    if spec == "digits":
        return _digits()
    name, _, folder = spec.partition("=")
    if name == "mnist" and folder:
        return _mnist(Path(folder))
    raise UsageError(f"--data: expected 'digits' or 'mnist=DIR', found {spec!r}")


def _digits() -> Images:
    from sklearn.datasets import load_digits  # a second's import that MNIST does not need

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 8 - 1
    # Twice as fine: at 8 x 8 neighbouring pixels have too little to do with each other.
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    return _split(
        "scikit-learn digits, 16 x 16", images, torch.from_numpy(labels).long(), n_test=500
    )


def _mnist(folder: Path) -> Images:
    if not folder.is_dir():
        raise UsageError(f"--data: expected a folder of MNIST's IDX files, found none at {folder}")
    images, labels = (_read_idx(folder, name) for name in _MNIST_FILES)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) < 100:
        raise UsageError(
            f"--data: expected images and as many labels in {folder}, found arrays of shapes "
            f"{images.shape} and {labels.shape}; download the files again"
        )
    scaled = torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 127.5 - 1
    n_test = len(images) // 5
    return _split("MNIST t10k", scaled, torch.from_numpy(labels.astype(np.int64)), n_test=n_test)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise UsageError(f"--data: expected {name}.gz or {name} in {folder}, found neither")
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
        zeros, kind, n_dims = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{n_dims}I", content[4 : 4 + 4 * n_dims])
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UsageError(f"--data: cannot read {path} ({error}); download it again") from None
    if zeros != 0 or kind != 0x08 or values.size != np.prod(shape):
        raise UsageError(
            f"--data: expected an IDX file of {' x '.join(map(str, shape))} bytes at {path}, "
            f"found {values.size}; it is truncated or something else, download it again"
        )
    return values.reshape(shape)


def _split(name: str, images: Tensor, labels: Tensor, *, n_test: int) -> Images:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, test = order[n_test:], order[:n_test]
    split = f"{len(train)} training and {n_test} test images of {len(images)}, fixed random split"
    return Images(name, split, (images[train], labels[train]), (images[test], labels[test]))
