"""Max-pooling with overlapping windows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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

# Taps up to which a kernel unrolls a window, and pixels of a stride, each a sum in registers, up
# to which backward does. Beyond, a loop needs fewer registers and hardly more instructions.
_FORWARD_TAPS = 9
_BACKWARD_TAPS, _BACKWARD_PIXELS = 25, 4


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
    kernel = pair(kernel_size, "kernel_size")
    strides = kernel if stride is None or stride in ((), []) else pair(stride, "stride")
    pads, dilations = pair(padding, "padding"), pair(dilation, "dilation")
    output_size = _output_size(input, kernel, strides, pads, dilations, ceil_mode)
    if input.numel() == 0 or not runs_triton("pool", input):
        return reference.max_pool2d(
            input, kernel, strides, pads, dilations, ceil_mode, return_indices
        )
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    save_code = torch.is_grad_enabled() and input.requires_grad
    geometry = _Geometry(*kernel, *strides, *pads, *dilations)
    output, indices = _MaxPool2d.apply(batch, output_size, geometry, save_code, return_indices)
    if input.dim() == 3:
        output = output.squeeze(0)
        indices = indices.squeeze(0) if return_indices else None
    return (output, indices) if return_indices else output


def _output_size(
    input: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> tuple[int, int]:
    """Output height and width by PyTorch's rule, after its checks."""
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise RuntimeError(
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got: {list(input.shape)}"
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
        extent = input.shape[axis - 2] + padding[axis]
        room = extent + padding[axis] - span
        steps = (room + (stride[axis] - 1 if ceil_mode else 0)) // stride[axis]
        if ceil_mode and steps * stride[axis] >= extent:
            steps -= 1  # the last window must start inside the image or its near border
        size.append(steps + 1)
    if min(size) < 1:
        raise RuntimeError(
            f"Given input size: {tuple(input.shape[-3:])}. Calculated output size: "
            f"{(input.shape[-3], *size)}. Output size is too small"
        )
    return size[0], size[1]


@dataclass(frozen=True)
class _Geometry:
    """The kernels' constants, under the names of their parameters."""

    KERNEL_H: int
    KERNEL_W: int
    STRIDE_H: int
    STRIDE_W: int
    PADDING_H: int
    PADDING_W: int
    DILATION_H: int
    DILATION_W: int

    @property
    def taps(self) -> int:
        return self.KERNEL_H * self.KERNEL_W

    def inside(self, input_size: Sequence[int], output_size: Sequence[int]) -> bool:
        """Whether every tap of every window is inside the image."""
        last_row = (output_size[0] - 1) * self.STRIDE_H + (self.KERNEL_H - 1) * self.DILATION_H
        last_column = (output_size[1] - 1) * self.STRIDE_W + (self.KERNEL_W - 1) * self.DILATION_W
        padding = self.PADDING_H + self.PADDING_W
        return padding == 0 and last_row < input_size[0] and last_column < input_size[1]

    def cells(self, input_size: Sequence[int]) -> tuple[int, int]:
        """How many cells of one stride cover the image, whose padding shifts the first."""
        height, width = input_size
        return (
            -(-(height + self.PADDING_H % self.STRIDE_H) // self.STRIDE_H),
            -(-(width + self.PADDING_W % self.STRIDE_W) // self.STRIDE_W),
        )


class _MaxPool2d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        output_size: tuple[int, int],
        geometry: _Geometry,
        save_code: bool,
        return_indices: bool,
    ) -> tuple[Tensor, Tensor | None]:
        input = dense(input)
        channels_last = is_channels_last(input)
        shape = (*input.shape[:2], *output_size)
        code_dtype = torch.uint8 if geometry.taps <= 256 else torch.int32
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
            output_size,
            input.shape[2:],
            output,
            channels_last,
            geometry,
            INSIDE=geometry.inside(input.shape[2:], output_size),
            UNROLL=geometry.taps if geometry.taps <= _FORWARD_TAPS else 1,
            CODE=save_code,
            INDICES=return_indices,
        )
        if code is not None:
            ctx.save_for_backward(code)
            ctx.input_size, ctx.channels_last = input.shape[2:], channels_last
            ctx.geometry = geometry
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        return output, indices

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, output_grad: Tensor, indices_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors
        geometry: _Geometry = ctx.geometry
        output_grad = dense_as(output_grad, ctx.channels_last)
        shape = (*code.shape[:2], *ctx.input_size)
        input_grad = empty(shape, output_grad, channels_last=ctx.channels_last)
        pixels = geometry.STRIDE_H * geometry.STRIDE_W
        if geometry.taps <= _BACKWARD_TAPS and pixels <= _BACKWARD_PIXELS:
            kernel, owned = device_code("pool").max_pool_backward, geometry.cells(ctx.input_size)
        else:
            kernel, owned = device_code("pool").max_pool_backward_looped, ctx.input_size
        _launch(
            kernel,
            (output_grad, code, input_grad),
            owned,
            ctx.input_size,
            output_grad,
            ctx.channels_last,
            geometry,
        )
        return input_grad, None, None, None, None


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    owned: Sequence[int],
    input_size: Sequence[int],
    output: Tensor,
    channels_last: bool,
    geometry: _Geometry,
    **flags: int,
) -> None:
    """Launch programs that own ``owned`` rows and columns of each image (see the kernels)."""
    images, channels, *output_size = output.shape
    outer, inner = (images, channels) if channels_last else (images * channels, 1)
    count = outer * owned[0] * owned[1] * inner
    blocks = config.pointwise(output, inner, scalar_block=512, count=count)
    launch(
        kernel,
        blocks.programs(count),
        *tensors,
        outer,
        *input_size,
        *output_size,
        inner,
        **asdict(geometry),
        **flags,
        BLOCK=blocks.rows,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )
