"""A network's probabilities for held-out images: their file, their errors, and their average."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexkern.files import replacing

# What float32 may lose in a softmax over ten thousand classes.
_SUM_TOLERANCE = 1e-3
# What numpy and zipfile raise for bytes that are no archive of arrays, or no longer one.
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one network, or the average of several, says of N images.

    Attributes:
        probabilities: float32 [N, classes]; each row sums to 1.
        labels: The true class of each image, int64 [N].
        class_names: Name of each class; labels index it.
        views: Crops of an image over which the probabilities are means: 1, or the paper's 10.
        name: For messages and tables; of what was loaded its file. Not kept in files.

    Raises:
        ValueError: The arrays are not as said here.
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    views: int
    name: str = "predictions"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.name}: {problem}")

    def _problem(self) -> str:
        """What is wrong with the values; empty if nothing is."""
        images = self.labels.size
        for field, array, dtype, shape in (
            ("labels", self.labels, "int64", (images,)),
            ("probabilities", self.probabilities, "float32", (images, self.classes)),
        ):
            found = f"{array.dtype} {list(array.shape)}"
            if found != f"{dtype} {list(shape)}":
                return f"{field} must be {dtype} {list(shape)}, got {found}"
        if not self.probabilities.size:
            return f"{images} images of {self.classes} classes"
        if self.views < 1:
            return f"views must be positive, got {self.views}"
        strange = (self.labels < 0) | (self.labels >= self.classes)
        if strange.any():
            image = int(strange.argmax())
            return f"label {self.labels[image]} of image {image} is none of {self.classes} classes"
        sums = self.probabilities.sum(1, dtype=np.float64)
        # not the other way round, as NaN is no probability either
        right = (np.abs(sums - 1) <= _SUM_TOLERANCE) & (self.probabilities.min(1) >= 0)
        if not right.all():
            image = int(right.argmin())
            row = self.probabilities[image]
            return (
                f"row {image} (sum {sums[image]:.4g}, least {row.min():.4g}) holds no "
                "probabilities: at least 0 and with a sum of 1, as softmax gives them"
            )
        return ""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read a file that :meth:`save` wrote, without running code from it.

        Raises:
            ValueError: There is none, or it is damaged, or its content is not as said above.
        """
        try:
            # opened here, as numpy leaves what it cannot read open
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                probabilities, labels = arrays["probabilities"], arrays["labels"]
                names, views = arrays["class_names"], arrays["views"]
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ValueError(f"{path} is no readable file of predictions ({reason})") from error
        if (names.dtype.kind, names.ndim) != ("U", 1) or (views.dtype.kind, views.ndim) != ("i", 0):
            raise ValueError(f"{path}: class_names must be texts, and views one integer")
        return cls(probabilities, labels, tuple(names.tolist()), int(views), str(path))

    def save(self, path: Path) -> None:
        """Write a ``.npz`` file, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        with replacing(path) as file:
            np.savez(
                file,
                probabilities=self.probabilities,
                labels=self.labels,
                class_names=np.array(self.class_names, np.str_),
                views=np.array(self.views, np.int64),
            )

    def error(self, k: int) -> float:
        """Fraction of the images whose label is not among the ``k`` most probable classes.

        Equal probabilities are ranked as by ``torch.topk``, which training uses too; more than
        there are classes counts as all of them.
        """
        import torch

        probabilities = torch.tensor(np.ascontiguousarray(self.probabilities))
        best = probabilities.topk(min(k, self.classes), dim=1).indices.numpy()
        return float((best != self.labels[:, None]).all(1).mean())

    def loss(self) -> float:
        """Mean of -log(probability of the label); infinite if one of them is 0."""
        right = np.take_along_axis(self.probabilities, self.labels[:, None], axis=1)
        with np.errstate(divide="ignore"):
            return float(-np.log(right, dtype=np.float64).mean())


def average(
    predictions: Sequence[Predictions], weights: Sequence[float] | None = None
) -> Predictions:
    """The mean of several networks' probabilities, as in the rows of 5 and 7 CNNs of the paper.

    Args:
        predictions: For the same images in the same order, over the same classes and as many
            views.
        weights: One of each; only their ratios count. ``None`` is the plain mean.

    Returns:
        Sums in float64, rounded to float32.

    Raises:
        ValueError: They do not fit, or a weight is not positive and finite.
    """
    if not predictions:
        raise ValueError("no predictions to average")
    shares = np.ones(len(predictions)) if weights is None else np.array(weights, np.float64)
    if len(shares) != len(predictions):
        raise ValueError(f"{len(shares)} weights for {len(predictions)} files: give one of each")
    if not ((shares > 0) & np.isfinite(shares)).all():
        raise ValueError(f"weights must be positive and finite, got {shares.tolist()}")
    shares /= shares.max()  # so that no sum is too large
    shares /= shares.sum()
    first, *others = predictions
    for other in others:
        difference = _difference(first, other)
        if difference:
            raise ValueError(f"{other.name} does not fit {first.name}: {difference}")
    mean = sum(
        np.multiply(each.probabilities, share, dtype=np.float64)
        for each, share in zip(predictions, shares, strict=True)
    )
    name = f"{'' if weights is None else 'weighted '}average of {len(predictions)}"
    return Predictions(
        np.asarray(mean, np.float32), first.labels, first.class_names, first.views, name
    )


def _difference(first: Predictions, other: Predictions) -> str:
    """Why the other's probabilities are not for the same; empty if they are."""
    for what, mine, theirs in (
        ("views", first.views, other.views),
        ("classes", first.classes, other.classes),
        ("images", len(first.labels), len(other.labels)),
    ):
        if mine != theirs:
            return f"{theirs} {what}, not {mine}"
    for number, (name, other_name) in enumerate(
        zip(first.class_names, other.class_names, strict=True)
    ):
        if name != other_name:
            return f"class {number} is {other_name!r}, not {name!r}"
    unequal = first.labels != other.labels
    if unequal.any():
        image = int(unequal.argmax())
        return (
            f"image {image} is of class {other.labels[image]}, not {first.labels[image]}, so these "
            "are other images or another order"
        )
    return ""
