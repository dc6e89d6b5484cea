"""Order, augmentation and batches: pure functions of (seed, epoch, sample)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from alexkern.data.dataset import DataError, Split
from alexkern.data.seeds import generator


class Batch(NamedTuple):
    """Stored images, what :func:`alexkern.ops.augment` is to do to each, and their classes.

    Attributes:
        images: uint8 [B, size, size, 3].
        corners: Top and left edge of each crop, int64 [B, 2].
        flips: Whether each crop is mirrored, bool [B].
        labels: int64 [B].
    """

    images: Tensor
    corners: Tensor
    flips: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from page-locked memory without waiting for the copy."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Batches(torch.utils.data.Dataset["Batch | DataError"]):
    """A sequence of batches, any of which can be made at any time by any worker.

    Args:
        split: Where images and labels come from.
        order: The samples, in the order of their use, int64 [n].
        corners: Top and left edge of each sample's crop, [N, 2], indexed by sample.
        flips: Whether each sample is mirrored, bool [N], indexed by sample.
        batch_size: Samples per batch; the last batch takes what is left.
    """

    def __init__(
        self,
        split: Split,
        order: NDArray[np.int64],
        corners: NDArray[np.int64],
        flips: NDArray[np.bool_],
        batch_size: int,
    ) -> None:
        self._split, self._order, self._corners, self._flips = split, order, corners, flips
        self._batch_size = batch_size

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
        parts = images, self._corners[samples], self._flips[samples], self._split.labels[samples]
        return Batch(*map(torch.from_numpy, parts))


def training_batches(
    split: Split, seed: int, epoch: int, batch_size: int, margin: int, flip: bool
) -> Batches:
    """One epoch in a new order: random crops, mirrored at random (paper section 4.1).

    Corners lie in 0 to ``margin`` inclusive, as in the 2012 code. Samples left over after the
    last whole batch sit this epoch out.

    Args:
        split: The training split.
        seed: Of the run.
        epoch: From 0.
        batch_size: Samples per batch; a smaller split gives one batch.
        margin: Side of a stored image minus that of a crop.
        flip: Whether crops may be mirrored.
    """
    count = len(split.labels)
    random = generator(seed, "epoch", epoch)
    order = random.permutation(count)
    corners = random.integers(0, margin, (count, 2), endpoint=True)
    flips = random.integers(0, 2, count).astype(bool) & flip
    used = max(count - count % batch_size, min(count, batch_size))
    return Batches(split, order[:used], corners, flips, batch_size)


def evaluation_batches(split: Split, batch_size: int, margin: int) -> Batches:
    """Every sample once, in order: the central crop, not mirrored."""
    count = len(split.labels)
    corners = np.full((count, 2), margin // 2)
    return Batches(split, np.arange(count), corners, np.zeros(count, bool), batch_size)


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
        yield batch
