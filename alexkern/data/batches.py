"""Order, augmentation and batches: pure functions of (seed, epoch, sample)."""

import signal
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from alexkern.data.dataset import DataError, Split
from alexkern.data.seeds import generator
from alexkern.parallel import Axis, Mesh

_ALONE = Axis()


class Batch(NamedTuple):
    """Crops of stored images, what :func:`alexkern.ops.augment` does to each, and their classes.

    Attributes:
        images: uint8 [B, size, size, 3].
        flips: Whether each crop is mirrored, bool [B].
        shift: What is added to each crop's colours, in grey levels, float32 [B, 3].
        labels: int64 [B]; in a column of a hybrid those of the other columns' images as well.
    """

    images: Tensor
    flips: Tensor
    shift: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from page-locked memory without waiting for the copy."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class Batches(torch.utils.data.Dataset["Batch | DataError"]):
    """A sequence of batches, any of which can be made at any time by any worker.

    Attributes:
        split: Where images and labels come from.
        crop_size: Side of the crops.
        batch_size: Samples per batch; the last batch takes what is left.
        order: The samples, in the order of their use, int64 [n].
        corners: Top and left edge of each crop, in the same order, [n, 2].
        flips: Whether each is mirrored, bool [n].
        shift: What is added to its colours, float32 [n, 3].
        replicas: Those among which a batch is divided, and which of them this one is.
        columns: Likewise those that divide a replica's images, though not its labels.
    """

    split: Split
    crop_size: int
    batch_size: int
    order: NDArray[np.int64]
    corners: NDArray[np.int64]
    flips: NDArray[np.bool_]
    shift: NDArray[np.float32]
    replicas: Axis = _ALONE
    columns: Axis = _ALONE

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index: int) -> "Batch | DataError":
        whole = range(len(self.order))[index * self.batch_size : (index + 1) * self.batch_size]
        rows = self.replicas.portion(whole)
        own = self.columns.portion(rows)
        part = slice(own.start, own.stop)
        samples, size = self.order[part], self.crop_size
        crops = np.empty((len(samples), size, size, 3), np.uint8)
        try:
            for crop, sample, (top, left) in zip(crops, samples, self.corners[part], strict=True):
                crop[:] = self.split.images[sample][top : top + size, left : left + size]
        except DataError as error:
            # Returned, for iterate() to raise: a worker's exception would arrive with the
            # worker's traceback for a message.
            return error
        labels = self.split.labels[self.order[rows.start : rows.stop]]
        parts = crops, self.flips[part], self.shift[part], labels
        return Batch(*map(torch.from_numpy, parts))


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied (paper section 4.1).

    Attributes:
        crop_size: Side of a crop.
        crop_offsets: Crops begin at pixel 0 to ``crop_offsets`` - 1 of each axis. The 2012 code has
            33 for 256 - 224; the paper counts 32 ("a factor of 2048").
        flip: Whether half of the crops are mirrored.
        chunk: So many images in a row share one corner and one decision to mirror (32 in the 2012
            code).
        colour_noise: float64 [3, 3]: standard normal numbers times this are added to an image's
            red, green and blue, in grey levels; None for nothing.
    """

    crop_size: int
    crop_offsets: int
    flip: bool
    chunk: int = 1
    colour_noise: NDArray[np.float64] | None = None


def training_batches(
    split: Split,
    seed: int,
    epoch: int,
    batch_size: int,
    augmentation: Augmentation,
    mesh: Mesh | None = None,
) -> Batches:
    """One epoch in a new order, each image in a new variation.

    Samples left over after the last whole batch sit this epoch out.

    Args:
        split: The training split.
        seed: Of the run.
        epoch: From 0.
        batch_size: Samples per batch; a smaller split gives one batch.
        augmentation: The variations to draw from.
        mesh: The processes that share each batch.
    """
    count = len(split.labels)
    random = generator(seed, "epoch", epoch)
    order = random.permutation(count)
    chunks = -(-count // augmentation.chunk)
    corners = random.integers(0, augmentation.crop_offsets, (chunks, 2))
    flips = random.integers(0, 2, chunks).astype(bool) & augmentation.flip
    shift = np.zeros((count, 3), np.float32)
    if augmentation.colour_noise is not None:
        shift[:] = random.standard_normal((count, 3)) @ augmentation.colour_noise
    used = max(count - count % batch_size, min(count, batch_size))
    return Batches(
        split,
        augmentation.crop_size,
        batch_size,
        order[:used],
        corners.repeat(augmentation.chunk, 0)[:used],
        flips.repeat(augmentation.chunk)[:used],
        shift[:used],
        *_sharing(mesh or Mesh()),
    )


def evaluation_batches(
    split: Split, stored_size: int, batch_size: int, mesh: Mesh | None = None
) -> Batches:
    """Every sample once, in order: whole stored images, of which crops are taken on the device.

    Each replica has a share of the samples, and makes whole batches of that.

    Args:
        split: The held-out split.
        stored_size: Side of its images.
        batch_size: Samples per batch of a replica.
        mesh: The processes that share the samples.
    """
    replicas, columns = _sharing(mesh or Mesh())
    order = np.array(replicas.portion(range(len(split.labels))), np.int64)
    count = len(order)
    corners, flips = np.zeros((count, 2), np.int64), np.zeros(count, bool)
    shift = np.zeros((count, 3), np.float32)
    return Batches(*(split, stored_size, batch_size, order, corners, flips, shift), columns=columns)


def _sharing(mesh: Mesh) -> tuple[Axis, Axis]:
    """What divides a batch, and its images once more; without groups, so that workers get it."""
    data, columns = mesh.data, mesh.columns if mesh.hybrid else Axis()
    return Axis(data.index, data.count), Axis(columns.index, columns.count)


def iterate(
    batches: Batches, workers: int = 0, pin_memory: bool = False, first: int = 0
) -> Generator[Batch, None, None]:
    """Batches ``first``, ``first + 1``, ... in order, made ahead by worker processes.

    Args:
        batches: The batches of one epoch.
        workers: Number of processes; 0 makes each batch when it is asked for. What comes out
            does not depend on it.
        pin_memory: Hand batches out in page-locked memory.
        first: Number of batches to leave out.

    Raises:
        DataError: An image cannot be decoded, or there is too little shared memory.
        RuntimeError: A worker process has died ("DataLoader worker ..."); raised at any time.
    """
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, len(batches)),
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_shared if workers else None,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    made = iter(loader)
    try:
        for batch in made:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except (ConnectionError, EOFError) as error:  # it died while it handed out a batch
        raise RuntimeError(f"DataLoader worker exited unexpectedly ({error!r})") from error
    finally:
        if workers:  # a worker's exception would keep them, with its traceback
            made._shutdown_workers()  # type: ignore[attr-defined]


@contextmanager
def on_device(
    batches: Batches, workers: int, device: torch.device, first: int = 0
) -> Iterator[Iterator[Batch]]:
    """Batches as :func:`iterate` and :func:`to_device` hand them out, while this context is open.

    However it is left, its worker processes end: they heed no signal, and an interpreter that
    exits would wait for them.
    """
    with closing(iterate(batches, workers, device.type == "cuda", first)) as made:
        yield to_device(made, device)


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device. A GPU gets the next one while it computes on the one before.

    Args:
        batches: In page-locked memory for a GPU, so that no copy waits.
        device: Where they shall be.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(copies):
            on_device = batch.to(device)
            copied = copies.record_event()
        if ahead is not None:
            yield _received(*ahead, current)
        ahead = on_device, copied
    if ahead is not None:
        yield _received(*ahead, current)


def _received(batch: Batch, copied: torch.cuda.Event, stream: torch.cuda.Stream) -> Batch:
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)  # its memory is the other stream's
    return batch


def _shared(batch: Any) -> Any:
    """The batch in shared memory, where a worker would put it later, and fail unheard."""
    try:
        for tensor in batch if isinstance(batch, Batch) else ():
            tensor.share_memory_()
    except RuntimeError as error:
        return DataError(
            f"no shared memory for a batch ({error}): a larger /dev/shm (docker run --shm-size) or "
            "fewer --workers help"
        )
    return batch


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes, but it is the parent's to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
