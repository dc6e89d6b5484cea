"""The one type of all data sets, and where each comes from."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alexkern.data.colours import Colours, principal_colours

BUILT_IN = ("digits", "cifar10", "synthetic")

# Mean image and colours are taken over so many training images at most, as a folder's must be
# decoded for it. Pixels spread by some 70 grey levels, so this mean is good to
# 70 / sqrt(2048) = 1.5 of them. A prepared store has them over all images.
MEAN_SAMPLE = 2048


class DataError(ValueError):
    """The data cannot be used as it is; the message is one line that names the fix."""


class Images(Protocol):
    """A sequence of square images of one size, such as an array [N, size, size, 3]."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """An image as uint8 RGB [size, size, 3], perhaps a view."""


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: N images.
        labels: Class of each image, int64 [N].
    """

    images: Images
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A training split and a held-out one.

    Attributes:
        name: For the log.
        class_names: Name of each class; labels index it.
        train, val: The splits.
        flip: Whether a mirrored image shows the same class.
        mean: Mean of the training images (of at most ``MEAN_SAMPLE`` of them, evenly spaced) in
            grey levels, float32 [size, size, 3]. A store's is over all of them.
        colours: Principal components of the same images' colours.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    flip: bool
    mean: NDArray[np.float32]
    colours: Colours

    @property
    def digest(self) -> str:
        """Of classes, labels and mean image: another one means other data."""
        parts = (self.train.labels, self.val.labels, self.mean)
        whole = hashlib.sha256(repr(self.class_names).encode())
        for part in parts:
            whole.update(part.tobytes())
        return whole.hexdigest()


def load_dataset(data: str, size: int, seed: int = 0) -> Dataset:
    """Open a data set.

    Args:
        data: ``"digits"``, ``"cifar10"``, ``"synthetic"``, a store that ``alexkern prepare`` made,
            or a folder with ``train/`` and ``val/``, each with one folder of images per class.
        size: Side in pixels at which images are handed out.
        seed: Of the synthetic images.

    Raises:
        DataError: Something is missing or wrong; one line that names the fix.
    """
    from alexkern.data import built_in, folder, store

    if data == "digits":
        class_names, train, val = built_in.digits(size)
    elif data == "cifar10":
        class_names, train, val = built_in.cifar10(size)
    elif data == "synthetic":
        class_names, train, val = built_in.synthetic(size, seed)
    elif store.is_store(Path(data)):
        return store.open_store(Path(data), size)
    else:
        class_names, train, val = folder.image_folder(data, size)
    mean, colours = _statistics(train.images)
    # A mirrored digit is none.
    return Dataset(data, class_names, train, val, data != "digits", mean, colours)


def _statistics(images: Images) -> tuple[NDArray[np.float32], Colours]:
    """Mean image and colours, from sums that are exact."""
    sample = np.linspace(0, len(images) - 1, min(len(images), MEAN_SAMPLE)).astype(int)
    # of integers: exact below 2**53
    total, products = np.zeros((1, 1, 3)), np.zeros((3, 3))
    for index in sample.tolist():
        image = images[index].astype(np.float64)
        pixels = image.reshape(-1, 3)
        total, products = total + image, products + pixels.T @ pixels
    mean = total / len(sample)
    colour = mean.mean((0, 1))
    covariance = products / (len(sample) * mean[..., 0].size) - np.outer(colour, colour)
    return mean.astype(np.float32), principal_colours(covariance)
