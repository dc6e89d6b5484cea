"""The layers of AlexNet that have kernels (paper section 3.5), at the paper's batch of 128."""

BATCH = 128

Padding = int | tuple[int, int, int, int]
Layer = tuple[tuple[int, int, int], int, int, int, Padding, int]

# name: input [C, H, W], output channels, kernel, stride, padding, groups
CONVOLUTIONS: dict[str, Layer] = {
    "conv1": ((3, 224, 224), 96, 11, 4, (0, 3, 0, 3), 1),
    "conv2": ((96, 27, 27), 256, 5, 1, 2, 2),
    "conv3": ((256, 13, 13), 384, 3, 1, 1, 1),
    "conv4": ((384, 13, 13), 384, 3, 1, 1, 2),
    "conv5": ((384, 13, 13), 256, 3, 1, 1, 2),
}
# number: input [C, H, W] of the 3x3 pooling with stride 2
POOLS = {"1": (96, 55, 55), "2": (256, 27, 27), "5": (256, 13, 13)}
# those whose input is normalised first
NORMALISED = ("1", "2")
# [units] of the layers with dropout
DROPOUTS = {"6": (4096,), "7": (4096,)}


def output_size(layer: Layer) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    (_, height, width), _, kernel, stride, padding, _ = layer
    left, right, top, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    rows = (height + top + bottom - kernel) // stride + 1
    return rows, (width + left + right - kernel) // stride + 1


def tiny(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of the same kind that Triton's interpreter can afford."""
    channels, *extents = shape
    channels = channels if channels == 3 else channels // 4
    return (channels, *(min(extent, 32 if channels == 3 else 11) for extent in extents))
