"""A run's numbers and filters for TensorBoard."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from alexkern.training.errors import UsageError
from alexkern.training.metrics import LayerChange, Row


class TensorBoard:
    """Writes what ``tensorboard --logdir`` shows.

    Args:
        folder: Of the event files.
        step: What an earlier part of this run wrote after it is hidden.

    Raises:
        UsageError: The package is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"--tensorboard needs its package: pip install tensorboard ({error})"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """A row of metrics, a scalar each."""
        for name, value in asdict(row).items():
            if value is not None and name != "step":
                self._writer.add_scalar(name.replace("_", "/", 1), value, row.step)
        self._writer.flush()

    def write_network(self, step: int, changes: Sequence[LayerChange], filters: Tensor) -> None:
        """Sizes of weights and updates, and the filters of conv1 as an image (paper, figure 3)."""
        for change in changes:
            for name in ("weight", "update", "ratio"):
                self._writer.add_scalar(f"{name}/{change.layer}", getattr(change, name), step)
        self._writer.add_image("conv1", filter_grid(filters), step)
        self._writer.flush()


def filter_grid(filters: Tensor, columns: int = 16) -> Tensor:
    """Filters side by side, each stretched to the whole range, a white pixel between them.

    Args:
        filters: [N, 3, height, width].
        columns: In a row of the grid.

    Returns:
        float32 [3, rows, columns] in 0 to 1, on the CPU.
    """
    filters = filters.detach().float().cpu()
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    scaled = (filters - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    count, _, height, width = scaled.shape
    rows = -(-count // columns)
    grid = torch.ones(rows * columns, 3, height + 1, width + 1)
    grid[:count, :, :height, :width] = scaled
    grid = grid.view(rows, columns, 3, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    return grid.reshape(3, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]
