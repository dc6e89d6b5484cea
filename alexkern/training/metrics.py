"""What is measured in a run, and the file it goes to."""

import csv
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexkern.data import Batch
from alexkern.files import replacing


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


@dataclass(frozen=True)
class LayerChange:
    """How large a layer's weights and their last update are, as the 2012 program logged them.

    Attributes:
        layer: Its name.
        weight: Mean magnitude of the weights.
        update: Mean magnitude of what the last step added to them.
    """

    layer: str
    weight: float
    update: float

    @property
    def ratio(self) -> float:
        """Update over weight; 0 for weights of 0."""
        return self.update / self.weight if self.weight else 0.0

    def __str__(self) -> str:
        return (
            f"{self.layer}: mean |weight| {self.weight:.3e}, mean |update| {self.update:.3e}, "
            f"ratio {self.ratio:.2e}"
        )


class MetricsFile:
    """metrics.csv: each row is in the file when it has been written.

    Args:
        path: The file.
        step: Rows of an earlier part of this run stay up to this step; those after it, whose
            steps are done again, go.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        names = [field.name for field in fields(Row)]
        kept = []
        if step and path.exists():
            # A line that a crash cut short does not end; after a power cut it may be anything.
            with open(path, newline="", errors="replace") as file:
                whole = [line for line in file if line.endswith("\n")]
            kept = [
                row
                for row in csv.reader(whole[1:])
                if len(row) == len(names) and row[0].isdecimal() and int(row[0]) <= step
            ]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([names, *kept])
        with replacing(path) as whole_file:
            whole_file.write(text.getvalue().encode())

    def write(self, row: Row) -> None:
        """Append a row."""
        with open(self._path, "a", newline="") as file:
            csv.writer(file).writerow(
                f"{value:.7g}" if isinstance(value, float) else value
                for value in asdict(row).values()
            )


@dataclass(frozen=True)
class Measured:
    """What :class:`Meter` measured since it was last reset; names as in :class:`Row`."""

    train_loss: float
    train_top1_error: float
    images: int  # in this process, within the seconds
    seconds: float
    waited: float

    @property
    def images_per_second(self) -> float:
        """Training speed."""
        return self.images / self.seconds

    @property
    def data_wait_share(self) -> float:
        """Fraction of the time spent waiting for batches."""
        return self.waited / self.seconds


class Meter:
    """Sums over the steps since it was last reset. They stay on the device until they are read.

    Args:
        device: Of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.reset()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time that each lets the caller wait is noted."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, sums: Tensor, images: int) -> None:
        """Note one step: float64 [2], its loss times images and its wrong answers."""
        self._sums += sums
        self._images += images
        self._timed_images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that this takes does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> Measured:
        """Means since the last reset. Waits for the device."""
        loss, wrong = (self._sums / self._images).tolist()
        seconds = time.perf_counter() - self._start
        return Measured(loss, wrong, self._timed_images, seconds, self._waited)

    def reset(self) -> None:
        """Start again."""
        self._sums.zero_()
        self._images = 0
        self.start()

    def start(self) -> None:
        """Start the clock again; the sums stay."""
        self._timed_images, self._waited, self._start = 0, 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Sums and their number of images, with which a resumed run's rows are the same."""
        return {"sums": self._sums.tolist(), "images": self._images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.reset()
        self._sums += torch.tensor(state["sums"], dtype=torch.float64, device=self._sums.device)
        self._images = state["images"]


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
