"""The principal components of the training pixels' colours (paper §4.1), from exact sums."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Colours:
    """Principal components of the training pixels' RGB values, largest first.

    Attributes:
        eigenvectors: float32 [3, 3], one per column.
        deviations: float32 [3], standard deviation along each, in grey levels.
    """

    eigenvectors: NDArray[np.float32]
    deviations: NDArray[np.float32]


def principal_colours(covariance: NDArray[np.float64]) -> Colours:
    """The components of a covariance.

    The largest entry of each eigenvector, by magnitude, is positive: either sign is right, and
    this makes equal covariances give equal components.

    Args:
        covariance: Of red, green and blue in grey levels, float64 [3, 3].
    """
    variances, vectors = np.linalg.eigh(covariance)  # ascending
    variances, vectors = variances[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(3)])
    deviations = np.sqrt(variances.clip(0))  # rounding leaves grey sets a little below 0
    return Colours(vectors.astype(np.float32), deviations.astype(np.float32))


def channel_products(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each pair of channels the exact sum of their product over all pixels, int64 [3, 3].

    Args:
        image: uint8 [height, width, 3].
    """
    channels = np.ascontiguousarray(image.reshape(-1, 3).T).astype(np.uint16)
    products = np.empty((3, 3), np.int64)
    for row in range(3):
        for column in range(row, 3):
            product = channels[row] * channels[column]  # at most 255 * 255, which 16 bits hold
            products[row, column] = products[column, row] = product.sum(dtype=np.int64)
    return products


def covariance(
    pixels: int, sums: NDArray[np.int64], products: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The covariance of red, green and blue, float64 [3, 3], each entry rounded once.

    Args:
        pixels: Number of pixels.
        sums: Sum of each channel over them, int64 [3].
        products: Sum of each pair's product over them, int64 [3, 3].
    """
    total = [int(value) for value in sums]  # Python's integers do not overflow
    rows = [
        [(pixels * int(products[a, b]) - total[a] * total[b]) / pixels**2 for b in range(3)]
        for a in range(3)
    ]
    return np.array(rows)
