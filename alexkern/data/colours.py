"""Principal components of colours, and the three readings of the paper's noise along them."""

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

    def noise(self, reading: str) -> NDArray[np.float64] | None:
        """What three standard normal numbers are multiplied by (from the left) to be noise.

        The paper (section 4.1) adds ``[p1, p2, p3] [a1 l1, a2 l2, a3 l3]^T`` with a of standard
        deviation 0.1, and calls the l eigenvalues of the covariance. Readings:

        - ``"stdev"``: l are their square roots, as in the 2012 code.
        - ``"fbresnet"``: l are eigenvalues of pixels scaled to 0..1, the product scaled back to
          0..255, as in fb.resnet.torch and most PyTorch code.
        - ``"literal"``: l are the eigenvalues of pixels in 0..255: noise beyond all colours.
        - ``"none"``: no noise.

        Args:
            reading: One of these.

        Returns:
            float64 [3, 3], in grey levels, or None for no noise.
        """
        deviations = self.deviations.astype(np.float64)
        if reading == "none":
            return None
        strengths = {
            "stdev": deviations,
            "fbresnet": deviations**2 / 255,
            "literal": deviations**2,
        }[reading]
        noise: NDArray[np.float64] = 0.1 * strengths[:, None] * self.eigenvectors.T
        return noise


def principal_colours(covariance: NDArray[np.float64]) -> Colours:
    """The principal components of a covariance of RGB values.

    An eigenvector's sign is free: each has a positive component of largest magnitude.

    Args:
        covariance: Symmetric [3, 3], in squared grey levels.
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return Colours((vectors * np.sign(largest)).astype(np.float32), np.sqrt(values).astype("f4"))
