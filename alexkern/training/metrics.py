"""What is measured in a run, and the file it goes to."""

import csv
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from alexkern.data import Batch


@dataclass(frozen=True)
class Evaluation:
    """Means over a split: cross-entropy, and top-1 and top-5 errors as fractions."""

    loss: float
    top1_error: float
    top5_error: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, top-1 error {self.top1_error:.2%}, "
            f"top-5 error {self.top5_error:.2%}"
        )


@dataclass(frozen=True)
class Row:
    """One row of metrics.csv; errors are fractions, ``None`` is an empty field.

    Attributes:
        step: Steps done.
        epoch: The epoch of the last of them, from 1.
        train_loss: Mean over the images since the row before.
        train_top1_error: Likewise.
        val_loss: Of the whole held-out split, after ``step`` steps.
        val_top1_error: Likewise.
        val_top5_error: Likewise.
        learning_rate: Of the last step.
        images_per_second: Training only, since the row before.
        data_wait_share: Fraction of that time spent waiting for batches.
    """

    step: int
    epoch: int
    train_loss: float
    train_top1_error: float
    val_loss: float | None
    val_top1_error: float | None
    val_top5_error: float | None
    learning_rate: float
    images_per_second: float
    data_wait_share: float


class MetricsFile:
    """metrics.csv: each row is on disk when it has been written.

    Args:
        path: The file.
        step: Rows of an earlier part of this run stay up to this step; those after it, whose
            steps are done again, go.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = []
        if step and path.exists():
            with open(path, newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(kept)

    def write(self, row: Row) -> None:
        """Append a row."""
        with open(self._path, "a", newline="") as file:
            csv.writer(file).writerow(
                f"{value:.7g}" if isinstance(value, float) else value
                for value in asdict(row).values()
            )


@dataclass(frozen=True)
class Measured:
    """What :class:`Meter` measured since it was last read; names as in :class:`Row`."""

    train_loss: float
    train_top1_error: float
    images: int
    seconds: float
    data_wait_share: float

    @property
    def images_per_second(self) -> float:
        """Training speed."""
        return self.images / self.seconds


class Meter:
    """Sums over the steps since it was last read. They stay on the device until then.

    Args:
        device: Of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)
        self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time that each lets the caller wait is noted."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Note one step: mean loss, logits [B, classes] and labels [B]."""
        wrong = wrong_answers(logits, labels, 1)
        self._sums += torch.stack((loss.detach() * len(labels), wrong))
        self._images += len(labels)

    def read(self) -> Measured:
        """Means since the last reading, and start again. Waits for the device."""
        loss, wrong = (self._sums / self._images).tolist()
        seconds = time.perf_counter() - self._start
        measured = Measured(loss, wrong, self._images, seconds, self._waited / seconds)
        self._sums.zero_()
        self._images, self._waited, self._start = 0, 0.0, time.perf_counter()
        return measured


def wrong_answers(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Number of samples whose label is not among the k highest scores.

    Args:
        logits: [B, classes].
        labels: int64 [B].
        k: More than there are classes counts as all of them.

    Returns:
        float32 scalar on the device of ``logits``.
    """
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best != labels[:, None]).all(1).sum().float()
