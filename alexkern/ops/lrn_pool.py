"""Local response normalisation and max-pooling in one pass."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from alexkern import reference
from alexkern.ops.lrn import (
    NORMALISATION,
    Normalisation,
    checked_normalisation,
    local_response_norm,
)
from alexkern.ops.pool import WINDOWS, Windows, checked_windows, max_pool2d
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch, like
from alexkern.runtime.layout import dense, dense_as, is_channels_last
from alexkern.runtime.operator import Operator, backward_may_follow

# Output rows of a forward program at most: its first costs half as much again as the others.
_OUT_ROWS = 9
# CUDA's limit on a grid's second dimension, which counts programs along output rows.
_MOST_OUT_ROWS = 65535 * _OUT_ROWS
# Cells that a backward thread takes in turn before its program sums over them.
_STEPS = 4


def lrn_max_pool2d(
    input: Tensor,
    size: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    alpha_mode: str = "mean",
    groups: int = 1,
) -> Tensor:
    """``max_pool2d(local_response_norm(input))``: the paper's tail of layers 1 and 2 (section 3).

    What lies between the two is never written to memory and never rounded to half precision.

    Args:
        input: [N, C, H, W] or [C, H, W], NCHW or channels_last (kept; other strides are copied
            once). float32, float16 and bfloat16 have kernels, computing in float32.
        size: channels in the normalisation's window, at least 1.
        kernel_size: extent of a pooling window in pixels, one int or (height, width).
        stride: distance of pooling windows in pixels; ``kernel_size`` if None or empty.
        padding: implicit border of -inf in pixels, at most half of ``kernel_size``.
        dilation: distance of a pooling window's taps in pixels.
        ceil_mode: round the output extent up, so that windows may hang over the far edges.
        alpha: of the normalisation, as are the following: see ``alpha_mode``.
        beta: the exponent.
        k: the constant, called bias elsewhere.
        alpha_mode: ``"mean"`` divides alpha by size, as PyTorch; ``"sum"`` does not, as the paper.
        groups: number of equal groups of channels whose borders no window crosses.

    One pass takes windows that lie inside the image (no padding, dilation or overhang), whose
    extents are one to two strides, the strides' product at most 4; normalisation over at most 9
    channels; and NCHW, or channels_last with a multiple of 8 channels per group. The paper's
    tails are such. Any other input goes through the two ops one after the other.

    Returns:
        The pooled tensor.

    Saves for backward: the input and one byte per output. Backward is deterministic; double
    backward raises.

    Raises:
        ValueError, RuntimeError, TypeError: what the two ops refuse.
    """
    windows = checked_windows(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    normalisation = checked_normalisation(batch.shape, size, alpha, beta, k, alpha_mode, groups)
    if input.numel() == 0 or not runs_triton(input):
        output = reference.lrn_max_pool2d(batch, *normalisation, *windows[:4], ceil_mode)
        return output if input.dim() == 4 else output.squeeze(0)
    batch = dense(batch)
    if fits_one_pass(batch.shape, is_channels_last(batch), normalisation, windows):
        output, _ = _forward(batch, *normalisation, *windows, backward_may_follow(batch))
    else:
        normalised = local_response_norm(batch, size, alpha, beta, k, alpha_mode, groups)
        pooled = max_pool2d(normalised, kernel_size, stride, padding, dilation, ceil_mode)
        assert isinstance(pooled, Tensor)  # a pair only if indices are asked for
        output = pooled
    return output if input.dim() == 4 else output.squeeze(0)


def fits_one_pass(
    shape: Sequence[int], channels_last: bool, normalisation: Normalisation, windows: Windows
) -> bool:
    """Whether the fused kernels take a dense [N, C, H, W] input of this shape and layout."""
    if not normalisation.fits_kernels(shape[1]) or windows.output_size[0] > _MOST_OUT_ROWS:
        return False
    if windows.dilation != (1, 1) or prod(windows.stride) > 4 or not windows.inside(shape[2:]):
        return False
    if not all(s <= k <= 2 * s for s, k in zip(windows.stride, windows.kernel, strict=True)):
        return False
    if channels_last:
        return normalisation.packed(shape[1], channels_last)
    return sum(normalisation.reach(shape[1])) <= 8


def normalise_and_pool(
    input: Tensor, normalisation: Normalisation, windows: Windows, save_code: bool
) -> tuple[Tensor, Tensor | None]:
    """The output for a dense input, and for backward the tap that won each window (uint8)."""
    output, code = pooled_like(input, windows, save_code)
    shape = output.shape
    images, chunks = shape[0], _chunks(input, normalisation)
    out_rows = -(-shape[2] // -(-shape[2] // _OUT_ROWS))
    blocks = config.chunks_of_channels(input, chunks, images * shape[3])
    launch(
        device_code("lrn_pool").lrn_max_pool_forward,
        (blocks.programs, -(-shape[2] // out_rows)),
        input,
        output,
        output if code is None else code,  # a pointer that is not used still needs a tensor
        images,
        *input.shape[2:],
        *windows.output_size,
        normalisation.scale,
        normalisation.k,
        CODE=save_code,
        OUT_ROWS=out_rows,
        **_constants(input, normalisation, windows, blocks),
    )
    return output, code


def pooled_like(input: Tensor, windows: Windows, save_code: bool) -> tuple[Tensor, Tensor | None]:
    """Uninitialised: the two results of :func:`normalise_and_pool`."""
    channels_last = is_channels_last(input)
    shape = (*input.shape[:2], *windows.output_size)
    output = empty(shape, input, channels_last=channels_last)
    return output, empty(shape, input, torch.uint8, channels_last) if save_code else None


def pooled_normalisation_grad(
    output_grad: Tensor,
    input: Tensor,
    code: Tensor,
    normalisation: Normalisation,
    windows: Windows,
    relu: bool = False,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The input gradient, with ``relu`` zero where the input is not positive.

    With ``bias`` also its sum over images and pixels, in float32.
    """
    channels_last = is_channels_last(input)
    output_grad = dense_as(output_grad, channels_last)
    input_grad = empty(input.shape, input, channels_last=channels_last)
    images, channels, height, width = input.shape
    steps = _STEPS if bias else 1
    cells = images * -(-height // windows.stride[0]) * -(-width // windows.stride[1])
    chunks = _chunks(input, normalisation)
    blocks = config.chunks_of_channels(input, chunks, -(-cells // steps))
    parts = blocks.programs // -(-chunks // blocks.chunks_per_program)
    partial = empty((parts, channels), input, torch.float32) if bias else None
    launch(
        device_code("lrn_pool").lrn_max_pool_backward,
        (blocks.programs,),
        output_grad,
        code,
        input,
        input_grad,
        input_grad if partial is None else partial,
        images,
        height,
        width,
        *windows.output_size,
        normalisation.scale,
        normalisation.k,
        STEPS=steps,
        RELU=relu,
        BIAS=bias,
        **_constants(input, normalisation, windows, blocks),
    )
    return input_grad, None if partial is None else partial.sum(0)


def _chunks(input: Tensor, normalisation: Normalisation) -> int:
    """Groups of eight channels in an image, none of which crosses a group's border."""
    groups = normalisation.groups
    return groups * -(-input.shape[1] // groups // 8)


def _constants(
    input: Tensor, normalisation: Normalisation, windows: Windows, blocks: config.ChunkConfig
) -> dict[str, Any]:
    return {
        "CHANNELS": input.shape[1],
        **normalisation.constants(input.shape[1]),
        "KERNEL_H": windows.kernel[0],
        "KERNEL_W": windows.kernel[1],
        "STRIDE_H": windows.stride[0],
        "STRIDE_W": windows.stride[1],
        "BLOCK": blocks.block,
        "CHUNKS": _chunks(input, normalisation),
        "CHUNKS_PER_PROGRAM": blocks.chunks_per_program,
        "PACKED": is_channels_last(input),
        "num_warps": blocks.num_warps,
    }


def _forward_pass(input: Tensor, *numbers: Any) -> tuple[Tensor, Tensor | None]:
    *both, save_code = numbers
    return normalise_and_pool(dense(input), *parted(both), save_code)


def _backward_pass(output_grad: Tensor, input: Tensor, code: Tensor, *numbers: Any) -> Tensor:
    input = dense(input)
    code = dense_as(code, is_channels_last(input))
    return pooled_normalisation_grad(output_grad, input, code, *parted(numbers))[0]


def parted(numbers: Sequence[Any]) -> tuple[Normalisation, Windows]:
    """The two that were joined to an operator's arguments."""
    split = len(Normalisation._fields)
    return Normalisation(*numbers[:split]), Windows(*numbers[split:])


def _save(context: Any, arguments: tuple[Any, ...], outputs: tuple[Tensor, Tensor | None]) -> None:
    input, *context.numbers, context.saved_code = arguments
    if outputs[1] is not None:
        context.mark_non_differentiable(outputs[1])
    context.save_for_backward(input, outputs[1])


def _input_grad(context: Any, output_grad: Tensor, _: None) -> tuple[Tensor]:
    if not context.saved_code:
        raise RuntimeError("alexkern::lrn_max_pool2d kept nothing for backward: save_code is False")
    return (_backward(output_grad, *context.saved_tensors, *context.numbers),)


def _fake_outputs(input: Tensor, *numbers: Any) -> tuple[Tensor, Tensor | None]:
    *both, save_code = numbers
    return pooled_like(input, parted(both)[1], save_code)


_NUMBERS = f"{NORMALISATION}, {WINDOWS}"
_backward = Operator(
    f"lrn_max_pool2d_backward(Tensor output_grad, Tensor input, Tensor code, {_NUMBERS}) -> Tensor",
    _backward_pass,
    fake=lambda output_grad, input, *_: like(input),
)
_forward = Operator(
    f"lrn_max_pool2d(Tensor input, {_NUMBERS}, bool save_code) -> (Tensor, Tensor)",
    _forward_pass,
    fake=_fake_outputs,
    save=_save,
    backward=_input_grad,
)
