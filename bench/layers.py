"""The layers of AlexNet that have kernels (paper section 3.5), at the paper's batch of 128."""

from typing import Any, NamedTuple

BATCH = 128

Shape = tuple[int, int, int]


class Convolution(NamedTuple):
    """Input [C, H, W]; padding is that of all sides, or (left, right, top, bottom)."""

    shape: Shape
    channels: int
    kernel: int
    stride: int
    padding: int | tuple[int, int, int, int]
    groups: int

    @property
    def group_in(self) -> int:
        """Input channels of a group."""
        return self.shape[0] // self.groups

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width."""
        _, height, width = self.shape
        sides = (self.padding,) * 4 if isinstance(self.padding, int) else self.padding
        left, right, top, bottom = sides
        rows = (height + top + bottom - self.kernel) // self.stride + 1
        return rows, (width + left + right - self.kernel) // self.stride + 1


# side of the stored images, height and width of a crop (section 4.1)
AUGMENTATION = (256, 224, 224)
# arguments of ops.augment that make such a crop the packed input of conv1
PACKING: dict[str, Any] = {"padding": (0, 4, 0, 4), "space_to_depth": 4}
CONVOLUTIONS = {
    "conv1": Convolution((3, 224, 224), 96, 11, 4, (0, 3, 0, 3), 1),
    "conv2": Convolution((96, 27, 27), 256, 5, 1, 2, 2),
    "conv3": Convolution((256, 13, 13), 384, 3, 1, 1, 1),
    "conv4": Convolution((384, 13, 13), 384, 3, 1, 1, 2),
    "conv5": Convolution((384, 13, 13), 256, 3, 1, 1, 2),
}
# number: input [C, H, W] of the 3x3 pooling with stride 2
POOLS: dict[str, Shape] = {"1": (96, 55, 55), "2": (256, 27, 27), "5": (256, 13, 13)}
# those whose input is normalised first
NORMALISED = ("1", "2")
# inputs and outputs
FULLY_CONNECTED = {"fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000)}
# [units] of the layers with dropout
DROPOUTS = {"6": (4096,), "7": (4096,)}


def tiny(shape: Shape) -> Shape:
    """A shape of the same kind that Triton's interpreter can afford."""
    channels, height, width = shape
    if channels == 3:
        return channels, min(height, 32), min(width, 32)
    return channels // 4, min(height, 11), min(width, 11)


def tiny_convolution(layer: Convolution) -> Convolution:
    """A layer of the same kind, likewise."""
    return layer._replace(shape=tiny(layer.shape), channels=layer.channels // 4)
