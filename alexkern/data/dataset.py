"""The one type of all data sets, and where each comes from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BUILT_IN = ("digits", "cifar10", "synthetic")

# The mean image is taken over so many training images at most, as a folder's must be decoded for
# it. Pixels spread by some 70 grey levels, so this mean is good to 70 / sqrt(2048) = 1.5 of them.
MEAN_SAMPLE = 2048


class DataError(ValueError):
    """The data cannot be used as it is; the message is one line that names the fix."""


class Images(Protocol):
    """Square images of one size, made when asked for."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of ``indices`` [B] as uint8 RGB [B, size, size, 3]."""


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
            grey levels, float32 [size, size, 3].
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    flip: bool
    mean: NDArray[np.float32]


def load_dataset(data: str, size: int, seed: int = 0) -> Dataset:
    """Open a data set.

    Args:
        data: ``"digits"``, ``"cifar10"``, ``"synthetic"``, or a folder with ``train/`` and
            ``val/``, each with one folder of images per class.
        size: Side in pixels at which images are handed out.
        seed: Of the synthetic images.

    Raises:
        DataError: Something is missing or wrong; one line that names the fix.
    """
    from alexkern.data import built_in, folder

    if data == "digits":
        class_names, train, val = built_in.digits(size)
    elif data == "cifar10":
        class_names, train, val = built_in.cifar10(size)
    elif data == "synthetic":
        class_names, train, val = built_in.synthetic(size, seed)
    else:
        class_names, train, val = folder.image_folder(data, size)
    mean = _mean_image(train.images)
    # A mirrored digit is none.
    return Dataset(data, class_names, train, val, flip=data != "digits", mean=mean)


def _mean_image(images: Images) -> NDArray[np.float32]:
    sample = np.linspace(0, len(images) - 1, min(len(images), MEAN_SAMPLE)).astype(np.int64)
    chunks = np.array_split(sample, -(-len(sample) // 64))
    total = np.sum([images[chunk].sum(0, dtype=np.int64) for chunk in chunks], 0)
    mean: NDArray[np.float32] = (total / len(sample)).astype(np.float32)
    return mean
