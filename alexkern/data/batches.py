"""Order, augmentation and batches: pure functions of (seed, epoch, sample)."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from alexkern.data.dataset import DataError, Split
from alexkern.data.seeds import generator

Batch = tuple[Tensor, Tensor]
"""Images uint8 [B, crop, crop, 3] and labels int64 [B], on the CPU."""


class Batches(torch.utils.data.Dataset["Batch | DataError"]):
    """A sequence of batches, any of which can be made at any time by any worker.

    Args:
        split: Where images and labels come from.
        order: The samples, in the order of their use, int64 [n].
        corners: Top and left edge of each sample's crop, [N, 2], indexed by sample.
        flips: Whether each sample is mirrored, bool [N], indexed by sample.
        batch_size: Samples per batch; the last batch takes what is left.
        crop_size: Side of a crop in pixels.
    """

    def __init__(
        self,
        split: Split,
        order: NDArray[np.int64],
        corners: NDArray[np.int64],
        flips: NDArray[np.bool_],
        batch_size: int,
        crop_size: int,
    ) -> None:
        self._split, self._order, self._corners, self._flips = split, order, corners, flips
        self._batch_size, self._crop_size = batch_size, crop_size

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, index: int) -> "Batch | DataError":
        first = index * self._batch_size
        samples = self._order[first : first + self._batch_size]
        try:
            images = self._split.images[samples]
        except DataError as error:
            # Returned, for iterate() to raise: a worker's exception would arrive with the
            # worker's traceback for a message.
            return error
        size = self._crop_size
        crops = np.empty((len(samples), size, size, 3), np.uint8)
        for crop, image, sample in zip(crops, images, samples, strict=True):
            top, left = self._corners[sample]
            window = image[top : top + size, left : left + size]
            crop[:] = window[:, ::-1] if self._flips[sample] else window
        return torch.from_numpy(crops), torch.from_numpy(self._split.labels[samples])


def training_batches(
    split: Split, seed: int, epoch: int, batch_size: int, crop_size: int, margin: int, flip: bool
) -> Batches:
    """One epoch in a new order: random crops, mirrored at random (paper section 4.1).

    Corners lie in 0 to ``margin`` inclusive, as in the 2012 code. Samples left over after the
    last whole batch sit this epoch out.

    Args:
        split: The training split.
        seed: Of the run.
        epoch: From 0.
        batch_size: Samples per batch; a smaller split gives one batch.
        crop_size: Side of a crop in pixels.
        margin: Side of a stored image minus ``crop_size``.
        flip: Whether crops may be mirrored.
    """
    count = len(split.labels)
    random = generator(seed, "epoch", epoch)
    order = random.permutation(count)
    corners = random.integers(0, margin, (count, 2), endpoint=True)
    flips = random.integers(0, 2, count).astype(bool) & flip
    used = max(count - count % batch_size, min(count, batch_size))
    return Batches(split, order[:used], corners, flips, batch_size, crop_size)


def evaluation_batches(split: Split, batch_size: int, crop_size: int, margin: int) -> Batches:
    """Every sample once, in order: the central crop, not mirrored."""
    count = len(split.labels)
    corners = np.full((count, 2), margin // 2)
    return Batches(split, np.arange(count), corners, np.zeros(count, bool), batch_size, crop_size)


def iterate(
    batches: Batches, workers: int = 0, pin_memory: bool = False, first: int = 0
) -> Iterator[Batch]:
    """Batches ``first``, ``first + 1``, ... in order, made ahead by worker processes.

    Args:
        batches: The batches of one epoch.
        workers: Number of processes; 0 makes each batch when it is asked for. What comes out
            does not depend on it.
        pin_memory: Hand batches out in page-locked memory.
        first: Number of batches to leave out.

    Raises:
        DataError: An image cannot be decoded.
    """
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, len(batches)),
        num_workers=workers,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        images, labels = batch
        yield images, labels


def to_input(images: Tensor, mean: Tensor, std: float) -> Tensor:
    """``(image - mean) / std`` on the images' device.

    Args:
        images: uint8 [B, crop, crop, 3].
        mean: Mean image in grey levels, float32 [size, size, 3]; its central crop is subtracted,
            the same for every crop (as the 2012 code does).
        std: In grey levels.

    Returns:
        float32 [B, 3, crop, crop], channels_last in memory.
    """
    crop = images.shape[1]
    corner = (mean.shape[0] - crop) // 2
    centre = mean[corner : corner + crop, corner : corner + crop]
    return ((images.float() - centre) / std).permute(0, 3, 1, 2)
