"""The vendor's convolutions (cuDNN's on a GPU), without bias and ReLU, in four variants.

``nchw`` and ``channels_last`` say in which layout the vendor works: operands in the other one are
copied, and so is the result. ``..._split`` makes one plain convolution per group, of contiguous
parts. Output and weight gradient come in the layout of input and weight.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from alexkern.runtime.launch import empty
from alexkern.runtime.layout import dense_as, is_channels_last

VARIANTS = ("nchw", "channels_last", "nchw_split", "channels_last_split")

# stride, padding (left, right, top, bottom), dilation, groups
Extents = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]


def convolve(input: Tensor, weight: Tensor, extents: Extents, variant: str) -> Tensor:
    """``conv2d(input, weight)``, [N, C_out, H_out, W_out] in the input's layout."""
    _, (left, right, top, bottom), _, groups = extents
    channels_last = is_channels_last(input)
    if (left, top) != (right, bottom):
        input = F.pad(input, (left, right, top, bottom))
    parts, layout = _parts(variant, groups)
    outputs = [
        torch.ops.aten.convolution(x, w, None, *_geometry(extents, groups // parts))
        for x, w in zip(_cut(input, 1, parts, layout), _cut(weight, 0, parts, layout), strict=True)
    ]
    return dense_as(_join(outputs, 1), channels_last)


def input_grad(
    output_grad: Tensor, weight: Tensor, input_shape: Sequence[int], extents: Extents, variant: str
) -> Tensor:
    """The gradient of :func:`convolve`'s input, in whatever layout."""
    _, (left, right, top, bottom), _, groups = extents
    images, channels, height, width = input_shape
    if (left, top) != (right, bottom):
        height, width = height + top + bottom, width + left + right
    parts, layout = _parts(variant, groups)
    unread = empty((images, channels // parts, height, width), output_grad, channels_last=layout)
    operands = (
        _cut(output_grad, 1, parts, layout),
        [unread] * parts,  # asked for its shape only
        _cut(weight, 0, parts, layout),
    )
    gradient = _join(_gradients(operands, _geometry(extents, groups // parts), 0), 1)
    if (left, top) != (right, bottom):
        gradient = gradient[:, :, top : top + input_shape[2], left : left + input_shape[3]]
    return gradient


def weight_grad(
    output_grad: Tensor, input: Tensor, weight: Tensor, extents: Extents, variant: str
) -> Tensor:
    """The gradient of :func:`convolve`'s weight, in the weight's layout."""
    _, (left, right, top, bottom), _, groups = extents
    if (left, top) != (right, bottom):
        input = F.pad(input, (left, right, top, bottom))
    parts, layout = _parts(variant, groups)
    operands = (
        _cut(output_grad, 1, parts, layout),
        _cut(input, 1, parts, layout),
        _cut(weight, 0, parts, layout),
    )
    gradients = _gradients(operands, _geometry(extents, groups // parts), 1)
    return dense_as(_join(gradients, 0), is_channels_last(weight))


def _gradients(
    operands: tuple[list[Tensor], ...], geometry: tuple[object, ...], wanted: int
) -> list[Tensor]:
    """Of the inputs (0) or the weights (1), from output gradients, inputs and weights."""
    mask = (wanted == 0, wanted == 1, False)
    return [
        torch.ops.aten.convolution_backward(grad, input, weight, None, *geometry, mask)[wanted]
        for grad, input, weight in zip(*operands, strict=True)
    ]


@contextmanager
def without_cudnn() -> Iterator[None]:
    """For float64 truths: nothing to search for, and not the library that is measured."""
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _parts(variant: str, groups: int) -> tuple[int, bool]:
    """How many convolutions to make, and whether in channels_last."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return groups if variant.endswith("_split") else 1, variant.startswith("channels_last")


def _geometry(extents: Extents, groups: int) -> tuple[object, ...]:
    """The arguments of torch's convolution; padding that differs by side was added before."""
    stride, (left, right, top, bottom), dilation, _ = extents
    padding = (top, left) if (left, top) == (right, bottom) else (0, 0)
    return stride, padding, dilation, False, (0, 0), groups


def _cut(tensor: Tensor, dimension: int, parts: int, channels_last: bool) -> list[Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [part.contiguous(memory_format=layout) for part in tensor.chunk(parts, dimension)]


def _join(parts: list[Tensor], dimension: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dimension)
