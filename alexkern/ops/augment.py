"""Stored images to the network's input."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alexkern import reference
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch
from alexkern.runtime.operator import Operator

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def augment(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: float = 1.0,
    shift: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    space_to_depth: int = 1,
) -> Tensor:
    """Crop, mirror and normalise stored images (paper section 4.1) in one pass.

    Each crop has the size of ``mean``, and its values are

        ((pixel - mean) + shift) * (1 / std)

    in float32, in this order, with 1 / std rounded to float32 first (as PyTorch divides by a
    number on a GPU), then rounded to ``dtype``: the same bits on every backend and device. The
    mean is subtracted as it is, wherever the crop lies and whether or not it is mirrored (as the
    2012 code does).

    With ``padding`` and ``space_to_depth``, zeros are put around the crops so made, and blocks of
    pixels become channels: ``F.pixel_unshuffle(F.pad(crops, padding), space_to_depth)``, of which
    a convolution with that stride is one with stride 1 and a kernel so many times smaller (see
    ``alexkern.models.Preset.packing``). No pass of its own is needed for it.

    Nothing is drawn here: corners, flips and shift say what is done to each image, so that they
    can be functions of a seed, an epoch and a sample.

    Args:
        images: uint8 [B, H, W, 3], contiguous (other strides are copied once).
        corners: int64 or int32 [B, 2]: top and left edge of each crop. A coordinate outside of
            [0, H - height] or [0, W - width] is clamped to it: checking would make a GPU wait.
        flips: bool [B]: whether each crop is mirrored left to right.
        mean: float32 [height, width, 3] in grey levels. For crops of a stored mean image, its
            central one; one mean per channel can be expanded to this shape.
        std: positive number that divides, in grey levels.
        shift: float32 [B, 3]: what is added to all pixels of an image, per channel, in grey
            levels (the paper's change of the RGB intensities); None for nothing.
        dtype: float32, float16 or bfloat16.
        padding: (left, right, top, bottom): so many zeros around each normalised crop.
        space_to_depth: b: b x b pixels of the padded crop become one; its sides are multiples
            of b. Pixel (i, j) of a block and channel c give channel (c * b + i) * b + j.

    Returns:
        [B, 3 * b * b, (top + height + bottom) / b, (left + width + right) / b] of ``dtype``,
        channels_last in memory, which requires no grad.

    Raises:
        RuntimeError: a tensor of another shape, dtype or device, an image smaller than the crop,
            another ``dtype``, negative padding, or padded crops that blocks do not divide.
        TypeError: ``padding`` is not four ints, or ``space_to_depth`` no int.
        ValueError: ``std`` is not a positive finite number.
    """
    _check(images, corners, flips, mean, shift)
    _check_packing(mean, padding, space_to_depth)
    if dtype not in _DTYPES:
        raise RuntimeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if not 0.0 < std < math.inf:
        raise ValueError(f"std must be a positive finite number, got {std}")
    # the images are integers everywhere: the mean says what is computed in
    if images.numel() == 0 or not runs_triton(mean):
        return reference.augment(
            images, corners, flips, mean, std, shift, dtype, padding, space_to_depth
        )
    crops: Tensor = _apply(images, corners, flips, mean, shift, std, dtype, padding, space_to_depth)
    return crops


def _check(
    images: Tensor, corners: Tensor, flips: Tensor, mean: Tensor, shift: Tensor | None
) -> None:
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
        raise RuntimeError(
            f"images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if mean.dim() != 3 or mean.shape[2] != 3 or 0 in mean.shape or mean.dtype != torch.float32:
        raise RuntimeError(
            f"mean must be float32 [height, width, 3], got {mean.dtype} {list(mean.shape)}"
        )
    if images.shape[1] < mean.shape[0] or images.shape[2] < mean.shape[1]:
        raise RuntimeError(
            f"crops of {list(mean.shape[:2])}, the size of mean, do not fit images of "
            f"{list(images.shape[1:3])}"
        )
    batch = images.shape[0]
    for name, tensor, shape, dtypes in (
        ("corners", corners, [batch, 2], (torch.int64, torch.int32)),
        ("flips", flips, [batch], (torch.bool,)),
        ("shift", shift, [batch, 3], (torch.float32,)),
    ):
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype not in dtypes):
            raise RuntimeError(
                f"{name} must be {' or '.join(map(str, dtypes))} of shape {shape}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    for tensor in (corners, flips, mean, shift):
        if tensor is not None and tensor.device != images.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {images.device} and {tensor.device}!"
            )


def _check_packing(mean: Tensor, padding: tuple[int, int, int, int], side: int) -> None:
    four = isinstance(padding, tuple | list) and len(padding) == 4
    if not four or not all(isinstance(number, int) for number in (*padding, side)):
        raise TypeError(
            "padding must be four ints (left, right, top, bottom) and space_to_depth one, "
            f"got padding={padding} and space_to_depth={side}"
        )
    left, right, top, bottom = padding
    if min(padding) < 0 or side < 1:
        raise RuntimeError(
            "padding must not be negative and space_to_depth must be positive, "
            f"got padding={padding} and space_to_depth={side}"
        )
    padded = [top + mean.shape[0] + bottom, left + mean.shape[1] + right]
    if padded[0] % side or padded[1] % side:
        raise RuntimeError(
            f"space_to_depth={side} does not divide {padded}, the size of crops of "
            f"{list(mean.shape[:2])} with padding={padding}"
        )


def _crops(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    mean: Tensor,
    shift: Tensor | None,
    std: float,
    dtype: torch.dtype,
    padding: tuple[int, int, int, int],
    side: int,
) -> Tensor:
    batch, height, width, _ = images.shape
    crop_height, crop_width, _ = mean.shape
    left, _, top, _ = padding
    result = _crops_like(images, mean, dtype, padding, side)
    _, depth, rows, columns = result.shape
    mean = mean.contiguous()
    count = depth * rows * columns
    # vectors lie within a row of crops, and within a pixel of packed ones
    divisible = 3 * columns if side == 1 else depth
    blocks = config.pointwise(mean, divisible, width=16 // dtype.itemsize, count=count)
    (parts,) = blocks.programs(count)
    images_per_program = config.images_per_program(mean, parts, batch)
    launch(
        device_code("augment").augment_crops,
        (parts * -(-batch // images_per_program),),
        images.contiguous(),
        corners.contiguous(),
        flips.contiguous(),
        mean,
        # a pointer that the kernel does not use still needs a tensor
        mean if shift is None else shift.contiguous(),
        result,
        batch,
        height,
        width,
        crop_height,
        crop_width,
        rows,
        columns,
        top,
        left,
        images_per_program,
        1.0 / std,
        SHIFT=shift is not None,
        PADDED=any(padding),
        SIDE=side,
        BLOCK=blocks.rows,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )
    return result


def _crops_like(
    images: Tensor, mean: Tensor, dtype: torch.dtype, padding: Sequence[int], side: int
) -> Tensor:
    left, right, top, bottom = padding
    rows = (top + mean.shape[0] + bottom) // side
    columns = (left + mean.shape[1] + right) // side
    shape = (images.shape[0], 3 * side * side, rows, columns)
    return empty(shape, images, dtype, channels_last=True)


_apply = Operator(
    "augment(Tensor images, Tensor corners, Tensor flips, Tensor mean, Tensor? shift, float std, "
    "ScalarType dtype, SymInt[4] padding, SymInt space_to_depth) -> Tensor",
    _crops,
    fake=lambda images, corners, flips, mean, shift, std, *numbers: _crops_like(
        images, mean, *numbers
    ),
)
