"""Sets that need no files of the user's: digits, CIFAR-10 and synthetic images."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from alexkern.data.dataset import DataError, Split
from alexkern.data.seeds import generator

Splits = tuple[tuple[str, ...], Split, Split]


class ResizedImages:
    """Small images in memory, enlarged bilinearly when asked for.

    Args:
        images: uint8 [N, height, width, 3].
        size: Side of the images handed out.
    """

    def __init__(self, images: NDArray[np.uint8], size: int) -> None:
        self._images = images
        # Interpolation is linear in the pixels, along one axis after the other. torch's own would
        # wake all its threads for each of these small images.
        self._rows, self._columns = (
            F.interpolate(torch.eye(side)[None], size, mode="linear")[0].T.numpy()
            for side in images.shape[1:3]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        image = self._images[index].astype(np.float32)
        tall = np.tensordot(self._rows, image, 1)
        resized: NDArray[np.uint8] = np.rint(self._columns @ tall).astype(np.uint8)
        return resized


class SyntheticImages:
    """Images made on the spot: each class has its pattern of 4x4 colours, each image its noise.

    Args:
        split: Name that tells one split's noise from another's.
        labels: Class of each image, int64 [N].
        size: Side of the images.
        seed: Equal seeds give equal images.
    """

    def __init__(self, split: str, labels: NDArray[np.int64], size: int, seed: int) -> None:
        self._split, self._labels, self._size, self._seed = split, labels, size, seed

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        size, label = self._size, int(self._labels[index])
        colours = generator(self._seed, "pattern", label).integers(0, 192, (4, 4, 3), np.uint8)
        cell = -(-size // 4)
        pattern = colours.repeat(cell, 0).repeat(cell, 1)[:size, :size]
        random = generator(self._seed, self._split, int(index))
        noise = random.integers(0, 64, pattern.shape, np.uint8)
        image: NDArray[np.uint8] = pattern + noise  # at most 191 + 63
        return image


def digits(size: int) -> Splits:
    """scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, 10 classes.

    They come with scikit-learn (UCI's Optical Recognition of Handwritten Digits, its test part).
    One fixed shuffle parts them into 1437 for training and 360 held out.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"the digits need scikit-learn: pip install scikit-learn ({error})"
        ) from error
    source: Any = load_digits()
    grey = (source.images * (255 / 16)).round().astype(np.uint8)  # 0 to 16 in the source
    images = grey[..., None].repeat(3, -1)
    labels = source.target.astype(np.int64)
    order = generator("digits", "split").permutation(len(labels))
    train, val = (
        Split(ResizedImages(images[part], size), labels[part])
        for part in (order[:1437], order[1437:])
    )
    return tuple(str(digit) for digit in range(10)), train, val


def cifar10(size: int) -> Splits:
    """CIFAR-10: 50,000 training and 10,000 held-out colour images of 32x32 pixels, 10 classes.

    torchvision fetches and verifies it, into the folder of the environment variable
    ``ALEXKERN_DATA`` (``~/.cache/alexkern`` if not set).
    """
    root = Path(os.environ.get("ALEXKERN_DATA", "~/.cache/alexkern")).expanduser()
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise DataError(
            "CIFAR-10 needs a torchvision that fits this torch: pip install 'alexkern[cifar]' "
            f"({_one_line(error)})"
        ) from error
    try:
        train, val = (CIFAR10(str(root), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded to {root} ({_one_line(error)}): put "
            "cifar-10-python.tar.gz there, or name another folder in ALEXKERN_DATA"
        ) from error
    splits = [
        Split(ResizedImages(part.data, size), np.array(part.targets)) for part in (train, val)
    ]
    return tuple(train.classes), splits[0], splits[1]


def synthetic(size: int, seed: int) -> Splits:
    """Generated images that can be learnt: 12,800 for training and 1,280 held out.

    1000 classes, as ImageNet, where images are as large as the paper's, otherwise 10.
    """
    classes = 1000 if size >= 256 else 10
    splits = []
    for name, count in (("train", 12_800), ("val", 1_280)):
        labels = np.arange(count) % classes
        splits.append(Split(SyntheticImages(name, labels, size, seed), labels))
    return tuple(str(label) for label in range(classes)), splits[0], splits[1]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
