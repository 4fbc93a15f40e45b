"""Images: scikit-learn's handwritten digits (real, bundled with it) and CIFAR-10 from its official binary files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDS = 5  # parts of the digits, one of which is held out
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR10_TEST = ("test_batch.bin",)
CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then red, green and blue planes, row by row
CIFAR10_RECORDS = 10_000


@dataclass(frozen=True)
class Images:
    """Labelled images, kept as bytes (N, C, H, W) and transformed a batch at a time, on the device of the model.

    The transform is the textbook's: bilinear resize, centre crop to `size`, scale to 0..1, one channel repeated to
    three, minus `mean` over `std`.
    """

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    classes: tuple[str, ...]
    size: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """{"images": (N, 3, size, size) float32, "target": (N,) int64}."""
        images = self.pixels[indices].to(device, torch.float32) / 255
        if images.shape[-2:] != (self.resize, self.resize):
            images = F.interpolate(images, size=(self.resize, self.resize), mode="bilinear", antialias=True)
        edge = (self.resize - self.size) // 2
        images = images[:, :, edge : edge + self.size, edge : edge + self.size].expand(-1, 3, -1, -1)
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return {"images": (images - mean) / std, "target": self.labels[indices].to(device)}


def digits(size: int = 127, *, train: bool = True, fold: int = 0) -> Images:
    """Scikit-learn's 1,797 handwritten digits (8 x 8, 16 greys), resized to `size`: 1,437 to train on, 360 held out.

    One fixed permutation, the same for every run, cut in five: `fold` says which part is held out (0 to 4; the last one
    has 357 images). A figure that is to be worth something is of a part by which no setting was chosen.
    """
    if not 0 <= fold < FOLDS:
        raise DataError(f"digits: fold must be 0 to {FOLDS - 1}, got {fold}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    bundle = load_digits()
    order = torch.randperm(len(bundle.target), generator=torch.Generator().manual_seed(0))
    parts = list(order.split(len(order) // FOLDS + 1))
    held_out = parts.pop(fold)
    chosen = torch.cat(parts) if train else held_out
    pixels = torch.from_numpy(bundle.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bundle.target).long()
    names = tuple(str(digit) for digit in range(10))
    return Images(pixels[chosen], labels[chosen], names, size=size, resize=size)


def cifar10(root: str | Path, *, size: int = 224, resize: int = 256, train: bool = True) -> Images:
    """CIFAR-10 from the official "binary version": 50,000 images to train on, 10,000 held out.

    Args:
        root: the folder with data_batch_1.bin .. data_batch_5.bin and test_batch.bin, or the one above it.
        size: edge of the centre crop.
        resize: edge after the bilinear resize.
        train: the five training files, or the test file.

    Raises:
        DataError: a file is missing, has not 10,000 records of 3,073 bytes, or holds a label above 9.
    """
    if not 0 < size <= resize:
        raise DataError(f"cifar10: the crop must be at most the resized image, got crop {size} and resize {resize}")
    folder = Path(root)
    if (folder / CIFAR10_FOLDER).is_dir():
        folder = folder / CIFAR10_FOLDER
    records = np.concatenate([_cifar10_file(folder / name) for name in (CIFAR10_TRAIN if train else CIFAR10_TEST)])
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32))
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    return Images(pixels, labels, CIFAR10_CLASSES, size=size, resize=resize)


def _cifar10_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(
            f"CIFAR-10: {path} is missing; unpack cifar-10-binary.tar.gz and pass the folder that holds "
            f"{', '.join(CIFAR10_TRAIN + CIFAR10_TEST)}"
        )
    expected, found = CIFAR10_RECORDS * CIFAR10_RECORD, path.stat().st_size
    if found != expected:
        raise DataError(f"CIFAR-10: {path} has {found:,} bytes, a whole file has {expected:,} (10,000 x 3,073)")
    records = np.fromfile(path, dtype=np.uint8).reshape(CIFAR10_RECORDS, CIFAR10_RECORD)
    if records[:, 0].max() >= len(CIFAR10_CLASSES):
        row = int(np.argmax(records[:, 0] >= len(CIFAR10_CLASSES)))
        raise DataError(f"CIFAR-10: {path} is damaged: record {row} has the label {records[row, 0]}, labels are 0 to 9")
    return records
