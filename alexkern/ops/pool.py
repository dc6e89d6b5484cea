"""Max-pooling with overlapping windows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alexkern import reference
from alexkern.ops.arguments import pair
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch
from alexkern.runtime.layout import dense, dense_as, is_channels_last


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows, as :func:`torch.nn.functional.max_pool2d`.

    The paper (section 3.4) pools 3x3 windows with stride 2 everywhere. The first maximum of a
    window in row-major order wins a tie and receives the gradient; NaN propagates.

    Args:
        input: [N, C, H, W] or [C, H, W], NCHW or channels_last (kept; other strides are copied
            once). float32, float16 and bfloat16 have kernels; other dtypes run the reference.
        kernel_size: window extent in pixels, one int or (height, width).
        stride: distance of windows in pixels; ``kernel_size`` if None or empty.
        padding: implicit border of -inf in pixels, at most half of ``kernel_size``.
        dilation: distance of the window's taps in pixels.
        ceil_mode: round the output extent up, so that windows may hang over the far edges.
        return_indices: also return the maxima's places.

    Returns:
        The pooled tensor; with ``return_indices`` also an int64 tensor of its shape that holds
        ``row * W + column`` of each maximum.

    Saves for backward: one byte per output (uint8 up to 256 taps per window, int32 beyond).
    Backward gathers without atomics and is deterministic; double backward raises.

    Raises:
        RuntimeError: what PyTorch refuses: bad dimensions, extents or padding.
        TypeError: an extent is not an int.
    """
    windows = checked_windows(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    if input.numel() == 0 or not runs_triton("pool", input):
        return reference.max_pool2d(input, *windows[:4], ceil_mode, return_indices)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    save_code = torch.is_grad_enabled() and input.requires_grad
    output, indices = _MaxPool2d.apply(batch, windows, save_code, return_indices)
    if input.dim() == 3:
        output = output.squeeze(0)
        indices = indices.squeeze(0) if return_indices else None
    return (output, indices) if return_indices else output


class Windows(NamedTuple):
    """Windows of a max-pool, after its checks; all are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output_size: tuple[int, int]


def checked_windows(
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> Windows:
    """The arguments of a max-pool over an input of this shape.

    Raises:
        RuntimeError, TypeError: see :func:`max_pool2d`.
    """
    kernel = pair(kernel_size, "kernel_size")
    strides = kernel if stride is None or stride in ((), []) else pair(stride, "stride")
    pads, dilations = pair(padding, "padding"), pair(dilation, "dilation")
    output_size = _output_size(shape, kernel, strides, pads, dilations, ceil_mode)
    return Windows(kernel, strides, pads, dilations, output_size)


def _output_size(
    shape: Sequence[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> tuple[int, int]:
    """Output height and width by PyTorch's rule, after its checks."""
    if len(shape) not in (3, 4) or 0 in shape[-3:]:
        raise RuntimeError(
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got: {list(shape)}"
        )
    for name, values, least in (
        ("kernel size", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(values) < least:
            raise RuntimeError(f"{name} should be at least {least}, but got {values}")
    size = []
    for axis in range(2):
        span = (kernel[axis] - 1) * dilation[axis] + 1
        if padding[axis] > kernel[axis] // 2:
            raise RuntimeError(
                "pad should be smaller than or equal to half of kernel size, but got "
                f"pad={padding[axis]}, kernel_size={kernel[axis]}"
            )
        extent = shape[axis - 2] + padding[axis]
        room = extent + padding[axis] - span
        steps = (room + (stride[axis] - 1 if ceil_mode else 0)) // stride[axis]
        if ceil_mode and steps * stride[axis] >= extent:
            steps -= 1  # the last window must start inside the image or its near border
        size.append(steps + 1)
    if min(size) < 1:
        raise RuntimeError(
            f"Given input size: {tuple(shape[-3:])}. Calculated output size: "
            f"{(shape[-3], *size)}. Output size is too small"
        )
    return size[0], size[1]


class _MaxPool2d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        windows: Windows,
        save_code: bool,
        return_indices: bool,
    ) -> tuple[Tensor, Tensor | None]:
        input = dense(input)
        channels_last = is_channels_last(input)
        shape = (*input.shape[:2], *windows.output_size)
        taps = windows.kernel[0] * windows.kernel[1]
        code_dtype = torch.uint8 if taps <= 256 else torch.int32
        output = empty(shape, input, channels_last=channels_last)
        code = empty(shape, input, code_dtype, channels_last) if save_code else None
        indices = empty(shape, input, torch.int64, channels_last) if return_indices else None
        _launch(
            device_code("pool").max_pool_forward,
            # a pointer that the kernel does not use still needs a tensor
            (
                input,
                output,
                code if code is not None else output,
                indices if indices is not None else output,
            ),
            output,
            input.shape[2:],
            windows,
            channels_last,
            CODE=save_code,
            INDICES=return_indices,
        )
        if code is not None:
            ctx.save_for_backward(code)
            ctx.input_size, ctx.channels_last = input.shape[2:], channels_last
            ctx.windows = windows
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        return output, indices

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, output_grad: Tensor, indices_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors
        output_grad = dense_as(output_grad, ctx.channels_last)
        shape = (*code.shape[:2], *ctx.input_size)
        input_grad = empty(shape, output_grad, channels_last=ctx.channels_last)
        _launch(
            device_code("pool").max_pool_backward,
            (output_grad, code, input_grad),
            input_grad,
            ctx.input_size,
            ctx.windows,
            ctx.channels_last,
        )
        return input_grad, None, None, None


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    owned: Tensor,
    input_size: Sequence[int],
    windows: Windows,
    channels_last: bool,
    **flags: bool,
) -> None:
    """Launch over the elements of ``owned``, the result that the programs write."""
    inner = owned.shape[1] if channels_last else 1
    blocks = config.pointwise(owned, inner, scalar_block=512)
    names = ("KERNEL", "STRIDE", "PADDING", "DILATION")
    extents = [extent for extents in windows[:4] for extent in extents]
    constants = dict(zip([n + axis for n in names for axis in ("_H", "_W")], extents, strict=True))
    launch(
        kernel,
        blocks.programs(owned.numel()),
        *tensors,
        owned.numel(),
        *input_size,
        *windows.output_size,
        inner,
        **constants,
        **flags,
        BLOCK=blocks.rows,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )
