"""Max-pooling with overlapping windows."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexkern import reference
from alexkern.ops.arguments import pair
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch
from alexkern.runtime.layout import dense, dense_as, is_channels_last
from alexkern.runtime.operator import Operator, backward_may_follow

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
    windows = checked_windows(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    if input.numel() == 0 or not runs_triton(input):
        return reference.max_pool2d(input, *windows[:4], ceil_mode, return_indices)
    batch = dense(input if input.dim() == 4 else input.unsqueeze(0))
    save_code = backward_may_follow(batch)
    output, _, indices = _forward(batch, *windows, save_code, return_indices)
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

    @property
    def taps(self) -> int:
        """Of one window."""
        return self.kernel[0] * self.kernel[1]

    def inside(self, input_size: Sequence[int]) -> bool:
        """Whether every tap of every window is inside the image."""
        spans = [
            (self.output_size[axis] - 1) * self.stride[axis]
            + (self.kernel[axis] - 1) * self.dilation[axis]
            for axis in range(2)
        ]
        return self.padding == (0, 0) and all(s < n for s, n in zip(spans, input_size, strict=True))

    def cells(self, input_size: Sequence[int]) -> tuple[int, int]:
        """How many cells of one stride cover the image, whose padding shifts the first."""
        shifted = [input_size[axis] + self.padding[axis] % self.stride[axis] for axis in range(2)]
        return -(-shifted[0] // self.stride[0]), -(-shifted[1] // self.stride[1])

    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        names = ("KERNEL", "STRIDE", "PADDING", "DILATION")
        return {
            name + axis: extent
            for name, extents in zip(names, self[:4], strict=True)
            for axis, extent in zip(("_H", "_W"), extents, strict=True)
        }


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


def _outputs(
    input: Tensor, windows: Windows, save_code: bool, return_indices: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Pooled values, the winners' taps and places, all in the input's layout."""
    channels_last = is_channels_last(input)
    shape = (*input.shape[:2], *windows.output_size)
    code_dtype = torch.uint8 if windows.taps <= 256 else torch.int32
    output = empty(shape, input, channels_last=channels_last)
    code = empty(shape, input, code_dtype, channels_last) if save_code else None
    indices = empty(shape, input, torch.int64, channels_last) if return_indices else None
    return output, code, indices


def _pool(input: Tensor, *extents: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    *numbers, save_code, return_indices = extents
    windows = Windows(*numbers)
    input = dense(input)
    output, code, indices = _outputs(input, windows, save_code, return_indices)
    _launch(
        device_code("pool").max_pool_forward,
        # a pointer that the kernel does not use still needs a tensor
        (
            input,
            output,
            code if code is not None else output,
            indices if indices is not None else output,
        ),
        windows.output_size,
        input.shape[2:],
        windows,
        output,
        is_channels_last(input),
        INSIDE=windows.inside(input.shape[2:]),
        UNROLL=windows.taps if windows.taps <= _FORWARD_TAPS else 1,
        CODE=save_code,
        INDICES=return_indices,
    )
    return output, code, indices


def _pool_backward(
    output_grad: Tensor,
    code: Tensor,
    input_size: tuple[int, int],
    channels_last: bool,
    *extents: tuple[int, int],
) -> Tensor:
    windows = Windows(*extents)
    output_grad, code = dense_as(output_grad, channels_last), dense_as(code, channels_last)
    shape = (*code.shape[:2], *input_size)
    input_grad = empty(shape, output_grad, channels_last=channels_last)
    if windows.taps <= _BACKWARD_TAPS and prod(windows.stride) <= _BACKWARD_PIXELS:
        kernel, owned = device_code("pool").max_pool_backward, windows.cells(input_size)
    else:
        kernel, owned = device_code("pool").max_pool_backward_looped, input_size
    _launch(
        kernel,
        (output_grad, code, input_grad),
        owned,
        input_size,
        windows,
        output_grad,
        channels_last,
    )
    return input_grad


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    owned: Sequence[int],
    input_size: Sequence[int],
    windows: Windows,
    output: Tensor,
    channels_last: bool,
    **flags: int,
) -> None:
    """Launch programs that own ``owned`` rows and columns of each image (see the kernels)."""
    images, channels = output.shape[:2]
    outer, inner = (images, channels) if channels_last else (images * channels, 1)
    count = outer * owned[0] * owned[1] * inner
    blocks = config.pointwise(output, inner, scalar_block=512, count=count)
    launch(
        kernel,
        blocks.programs(count),
        *tensors,
        outer,
        *input_size,
        *windows.output_size,
        inner,
        **windows.constants(),
        **flags,
        BLOCK=blocks.rows,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )


def _save(context: Any, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    input, *context.windows, save_code, _ = arguments
    _, code, indices = outputs
    context.mark_non_differentiable(*(t for t in (code, indices) if t is not None))
    context.save_for_backward(code)
    context.input_size, context.channels_last = input.shape[2:], is_channels_last(input)
    context.saved_code = save_code


def _input_grad(context: Any, output_grad: Tensor, *_: None) -> tuple[Tensor]:
    if not context.saved_code:
        raise RuntimeError("alexkern::max_pool2d kept nothing for backward: save_code was False")
    (code,) = context.saved_tensors
    sizes = context.input_size, context.channels_last
    return (_backward(output_grad, code, *sizes, *context.windows),)


def _fake_pool(input: Tensor, *extents: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    *numbers, save_code, return_indices = extents
    return _outputs(input, Windows(*numbers), save_code, return_indices)


# of an operator, in the order of :class:`Windows`
WINDOWS = (
    "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt[2] output_size"
)
_backward = Operator(
    "max_pool2d_backward(Tensor output_grad, Tensor code, SymInt[2] input_size, "
    f"bool channels_last, {WINDOWS}) -> Tensor",
    _pool_backward,
    fake=lambda output_grad, code, input_size, channels_last, *windows: empty(
        (*code.shape[:2], *input_size), output_grad, channels_last=channels_last
    ),
)
_forward = Operator(
    f"max_pool2d(Tensor input, {WINDOWS}, bool save_code, bool return_indices) "
    "-> (Tensor, Tensor, Tensor)",
    _pool,
    fake=_fake_pool,
    save=_save,
    backward=_input_grad,
)
