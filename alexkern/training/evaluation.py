"""Errors on the held-out split: central crops, or ten crops of each image."""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from alexkern.data import Split, evaluation_batches, on_device
from alexkern.parallel import Mesh
from alexkern.training.errors import StoppedError, TrainingError
from alexkern.training.forward import Forward
from alexkern.training.metrics import Evaluation, wrong_answers


class View(NamedTuple):
    """A crop of the stored image."""

    top: int
    left: int
    flip: bool


def centre_crop(margin: int) -> list[View]:
    """The central crop.

    Args:
        margin: Side of a stored image minus that of a crop.
    """
    return [View(margin // 2, margin // 2, False)]


def ten_crops(margin: int) -> list[View]:
    """Four corners and the centre, and their mirror images (paper, section 4.1)."""
    middle = margin // 2
    corners = (0, 0), (0, margin), (margin, 0), (margin, margin), (middle, middle)
    return [View(*corner, flip) for flip in (False, True) for corner in corners]


class Evaluated(NamedTuple):
    """Result on the whole split.

    Attributes:
        evaluation: Loss and errors.
        probabilities: float32 [N, classes], on the first process if asked for, otherwise None.
    """

    evaluation: Evaluation
    probabilities: NDArray[np.float32] | None


@torch.inference_mode()
def evaluate(
    forward: Forward,
    split: Split,
    views: list[View],
    stored_size: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    *,
    keep: bool = False,
    stopping: Callable[[], object] = lambda: False,
    mesh: Mesh | None = None,
) -> Evaluated:
    """Predict each sample once, by the mean of the probabilities of its views (paper, 4.1).

    Each replica of the network takes a share of the samples. No sample is predicted twice to fill
    a batch: shares and last batches are of unequal size instead.

    Args:
        forward: From pixels to class scores; its network is in evaluation mode.
        split: The held-out split.
        views: Of each image.
        stored_size: Side of the stored images.
        batch_size: Images per batch.
        workers: Processes that make batches.
        device: Of the network.
        keep: Whether to return the probabilities.
        stopping: Asked before every batch, in all processes equally often.
        mesh: The processes that evaluate together.

    Raises:
        StoppedError: ``stopping`` said so.
        TrainingError: The processes did not predict as many samples as there are.
    """
    mesh = mesh or Mesh()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    kept: list[NDArray[np.float32]] = []
    share = evaluation_batches(split, stored_size, batch_size, mesh)
    largest = -(-len(split.labels) // mesh.data.count)
    with on_device(share, workers, device) as batches:
        for _ in range(-(-largest // batch_size)):
            if stopping():
                raise StoppedError
            if (batch := next(batches, None)) is None:
                continue
            labels = batch.labels
            scores = _log_probabilities(forward, batch.images, views, range(len(labels)))
            if mesh.columns.index:  # the first has the scores
                continue
            loss = F.nll_loss(scores, labels, reduction="sum")
            wrong = [wrong_answers(scores, labels, k) for k in (1, 5)]
            sums += torch.stack((loss, *wrong, torch.ones_like(loss) * len(labels)))
            if keep:
                kept.append(scores.exp().cpu().numpy())
    mesh.add_up(sums)
    *totals, count = sums.tolist()
    if count != len(split.labels):
        raise TrainingError(
            f"{count:.0f} samples were predicted, and the split has {len(split.labels)}"
        )
    probabilities = _gathered(kept, mesh) if keep else None
    return Evaluated(Evaluation(*(total / count for total in totals)), probabilities)


def _log_probabilities(forward: Forward, images: Tensor, views: list[View], rows: range) -> Tensor:
    """Logarithm of the mean over views of the probabilities, [B, classes]."""
    scores = []
    for top, left, flip in views:
        # filled on the device: a copy from the host would wait for all that it has yet to do
        corners = torch.full((len(images), 2), top, device=images.device)
        corners[:, 1] = left
        flips = torch.full((len(images),), flip, device=images.device)
        scores.append(F.log_softmax(forward(images, corners, flips, rows=rows), 1))
    return torch.stack(scores).logsumexp(0) - float(np.log(len(views)))


def _gathered(part: list[NDArray[np.float32]], mesh: Mesh) -> NDArray[np.float32] | None:
    """All processes' batches on the first; one that has no share of the samples has none."""
    if mesh.processes == 1:
        return np.concatenate(part)
    first = dist.get_rank() == 0
    parts = [part] * dist.get_world_size()
    dist.gather_object(part, parts if first else None)
    return np.concatenate(list(chain.from_iterable(parts))) if first else None
