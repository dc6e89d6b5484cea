"""Convolution, bias and ReLU as one op."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alexkern import reference
from alexkern.ops.arguments import autocast, check_dtypes, pair
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, interpreted, launch
from alexkern.runtime.layout import convolution_fp32_precision, dense, dense_as, is_channels_last


def conv2d_bias_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "relu",
) -> Tensor:
    """``relu(conv2d(input, weight) + bias)``, as :func:`torch.nn.functional.conv2d`.

    Args:
        input: [N, C, H, W] or [C, H, W], NCHW or channels_last (the output keeps it; other
            strides are copied once).
        weight: [C_out, C // groups, height, width] of the input's dtype.
        bias: [C_out] or None.
        stride: one int or (height, width), in pixels.
        padding: zeros around the input, in pixels: one int, (height, width), ``"same"``,
            ``"valid"``, or (left, right, top, bottom) for the 2012 code's 224 -> 55.
        dilation: one int or (height, width), in pixels.
        groups: C and C_out are cut into so many groups that see only each other.
        activation: ``"relu"`` or ``"none"``.

    float32, float16 and bfloat16 have kernels, summing in float32; float32 uses TF32 only where
    ``torch.backends.cudnn.conv.fp32_precision`` says so; other dtypes run the reference. Under
    autocast the operands are cast, as PyTorch casts a convolution's.

    Padding, and the pixels that a stride skips in backward, are multiplied as zeros: an infinite
    or NaN weight gives NaN there, where PyTorch's CPU convolution leaves these products out.

    Returns:
        [N, C_out, H_out, W_out], or without N for a 3-D input.

    Saves for backward: input, weight, and with ``"relu"`` the output, each only if a gradient
    needs it. Gradients that nobody asks for are not computed. Backward is deterministic; double
    backward raises.

    Raises:
        RuntimeError: what PyTorch refuses: shapes, dtypes or extents that do not fit.
        TypeError: an extent is not an int.
        ValueError: unknown ``activation``.
    """
    if activation not in ("relu", "none"):
        raise ValueError(f"activation must be 'relu' or 'none', got {activation!r}")
    input, weight, bias, extents = checked(input, weight, bias, stride, padding, dilation, groups)
    if input.numel() == 0 or not runs_triton("conv", input):
        return reference.conv2d_bias_relu(input, weight, bias, *extents, activation)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    output: Tensor = _Conv2dBiasReLU.apply(batch, weight, bias, extents, activation == "relu")
    return output if input.dim() == 4 else output.squeeze(0)


class Extents(NamedTuple):
    """A convolution's (height, width), its padding as (left, right, top, bottom), its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def padded(self) -> bool:
        """Whether taps may lie outside of the input."""
        return any(self.padding)

    def output_size(self, input: Tensor, weight: Tensor) -> tuple[int, int]:
        """Height and width.

        Raises:
            RuntimeError: the kernel is larger than the padded input.
        """
        left, right, top, bottom = self.padding
        padded = (input.shape[-2] + top + bottom, input.shape[-1] + left + right)
        span = [self.dilation[axis] * (weight.shape[2 + axis] - 1) + 1 for axis in range(2)]
        if padded[0] < span[0] or padded[1] < span[1]:
            raise RuntimeError(
                f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel "
                f"size: ({span[0]} x {span[1]}). Kernel size can't be greater than actual input "
                "size"
            )
        steps = [(padded[axis] - span[axis]) // self.stride[axis] for axis in range(2)]
        return steps[0] + 1, steps[1] + 1


def checked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor | None, Extents]:
    """A convolution's operands in autocast's dtype and its extents, after all checks.

    Raises:
        RuntimeError, TypeError: see :func:`conv2d_bias_relu`.
    """
    strides, dilations = pair(stride, "stride"), pair(dilation, "dilation")
    _check_operands(input, weight, bias, groups)
    pads = _four_sides(padding, weight, strides, dilations)
    input, weight, bias = autocast(input, weight, bias)
    check_dtypes(input, weight, bias)
    extents = Extents(strides, pads, dilations, groups)
    extents.output_size(input, weight)
    return input, weight, bias, extents


def _check_operands(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if weight.dim() != 4:
        raise RuntimeError(f"Expected a 4D weight, but got weight of size {list(weight.shape)}")
    if input.dim() not in (3, 4):
        raise RuntimeError(
            "Expected 3D (unbatched) or 4D (batched) input to conv2d, "
            f"but got input of size: {list(input.shape)}"
        )
    if groups < 1:
        raise RuntimeError(f"non-positive groups is not supported, got groups={groups}")
    out_channels, group_in = weight.shape[:2]
    if input.shape[-3] != group_in * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected input"
            f"{list(input.shape)} to have {group_in * groups} channels, "
            f"but got {input.shape[-3]} channels instead"
        )
    if out_channels % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size {list(weight.shape)} instead"
        )
    if weight.numel() == 0:
        raise RuntimeError(
            f"expected a weight with elements, but got weight of size {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with "
            f"{out_channels} elements, but got bias of size {list(bias.shape)} instead"
        )


def _four_sides(
    padding: int | Sequence[int] | str,
    weight: Tensor,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Padding as (left, right, top, bottom), after the checks on stride and dilation."""
    for name, values in (("stride", stride), ("dilation", dilation)):
        if min(values) < 1:
            raise RuntimeError(f"non-positive {name} is not supported, got {name}={values}")
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise RuntimeError(f"Invalid padding string: '{padding}'")
        if stride != (1, 1):
            raise RuntimeError(
                f"padding='same' is not supported for strided convolutions, got stride={stride}"
            )
        total_h = dilation[0] * (weight.shape[2] - 1)
        total_w = dilation[1] * (weight.shape[3] - 1)
        top, left = total_h // 2, total_w // 2
        return left, total_w - left, top, total_h - top
    if isinstance(padding, tuple | list) and len(padding) == 4:
        if not all(isinstance(side, int) for side in padding):
            raise TypeError(f"padding must be an int or a tuple of ints, got {padding!r}")
        left, right, top, bottom = padding
    else:
        top, left = pair(padding, "padding")
        right, bottom = left, top
    if min(left, right, top, bottom) < 0:
        raise RuntimeError(f"negative padding is not supported, got padding={padding}")
    return left, right, top, bottom


@dataclass(frozen=True)
class _Geometry:
    """The kernels' constants, under the names of their parameters."""

    GROUP_IN: int
    GROUP_OUT: int
    KERNEL_H: int
    KERNEL_W: int
    STRIDE_H: int
    STRIDE_W: int
    DILATION_H: int
    DILATION_W: int

    @classmethod
    def of(cls, weight: Tensor, extents: Extents) -> "_Geometry":
        """Padding is known by where the first tap lies, and by the output's size."""
        return cls(
            GROUP_IN=weight.shape[1],
            GROUP_OUT=weight.shape[0] // extents.groups,
            KERNEL_H=weight.shape[2],
            KERNEL_W=weight.shape[3],
            STRIDE_H=extents.stride[0],
            STRIDE_W=extents.stride[1],
            DILATION_H=extents.dilation[0],
            DILATION_W=extents.dilation[1],
        )

    @property
    def products(self) -> int:
        """Terms of each sum over taps and channels."""
        return self.KERNEL_H * self.KERNEL_W * self.GROUP_IN


class _Conv2dBiasReLU(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        extents: Extents,
        relu: bool,
    ) -> Tensor:
        input, weight = dense(input), dense(weight)
        output = convolve(input, weight, bias, extents, relu)
        needs_input, needs_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            input if needs_weight else None,
            weight if needs_weight or needs_input else None,
            output if relu else None,
        )
        ctx.input_shape, ctx.channels_last = input.shape, is_channels_last(input)
        ctx.extents = extents
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        output_grad = dense_as(output_grad, ctx.channels_last)
        output_grad, bias_grad = _epilogue_backward(output_grad, output, needs_bias)
        input_grad = weight_grad = None
        if needs_input:
            input_grad = convolution_input_grad(
                output_grad, weight, ctx.input_shape, ctx.extents, ctx.channels_last
            )
        if needs_weight:
            weight_grad = convolution_weight_grad(output_grad, input, weight, ctx.extents)
        return input_grad, weight_grad, bias_grad, None, None


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    extents: Extents,
    relu: bool,
) -> Tensor:
    """The output for dense operands, in the input's layout."""
    bias = None if bias is None else bias.contiguous()
    shape = (input.shape[0], weight.shape[0], *extents.output_size(input, weight))
    output = empty(shape, input, channels_last=is_channels_last(input))
    if _gains_from_depth(input, weight, extents):
        input = _deepened_input(input, shape, weight, extents)
        weight, extents = _deepened_weight(weight, extents), _UNIT
    if is_channels_last(input):
        weight = dense_as(weight, channels_last=True)  # neighbours in products and in memory
    geometry = _Geometry.of(weight, extents)
    padding = extents.padding[2], extents.padding[0]
    _launch_conv2d(input, weight, bias, output, geometry, padding, extents.padded, relu)
    return output


def convolution_input_grad(
    output_grad: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    extents: Extents,
    channels_last: bool,
) -> Tensor:
    """The input gradient from that before bias and ReLU.

    Pixels that leave the same rest when divided by the stride are reached by the same taps, every
    so many: for these it is a convolution of the output gradient with stride 1.
    """
    input_grad = empty(input_shape, output_grad, channels_last=channels_last)
    if channels_last:
        weight = dense_as(weight, channels_last=True)
    group_out = weight.shape[0] // extents.groups
    # [groups, ...] with the roles of input and output exchanged
    turned = weight.unflatten(0, (extents.groups, group_out)).transpose(1, 2)
    left, _, top, _ = extents.padding
    for rows in _phases(input_shape[2], weight.shape[2], extents, 0, top):
        for columns in _phases(input_shape[3], weight.shape[3], extents, 1, left):
            part = input_grad[:, :, rows.pixels, columns.pixels]
            reaching = turned[:, :, :, rows.taps, columns.taps]
            if reaching.numel() == 0:
                part.zero_()
                continue
            geometry = _Geometry(
                GROUP_IN=group_out,
                GROUP_OUT=weight.shape[1],
                KERNEL_H=reaching.shape[3],
                KERNEL_W=reaching.shape[4],
                STRIDE_H=1,
                STRIDE_W=1,
                DILATION_H=rows.dilation,
                DILATION_W=columns.dilation,
            )
            padding = rows.padding, columns.padding
            _launch_conv2d(output_grad, reaching, None, part, geometry, padding, True, False)
    return input_grad


class _Phase(NamedTuple):
    """Along one axis, input pixels that are reached by the same taps, and how.

    Of the pixels that ``pixels`` selects, number i is reached from output i - padding +
    m * dilation by tap number m of those that ``taps`` selects.
    """

    pixels: slice
    taps: slice
    dilation: int
    padding: int


def _phases(size: int, kernel: int, extents: Extents, axis: int, padding: int) -> list[_Phase]:
    stride, dilation = extents.stride[axis], extents.dilation[axis]
    found = []
    for rest in range(min(stride, size)):
        reaching = [t for t in range(kernel) if (rest + padding - t * dilation) % stride == 0]
        first = reaching[0] if reaching else kernel
        common = math.gcd(stride, dilation)
        found.append(
            _Phase(
                slice(rest, None, stride),
                slice(first, None, stride // common),
                -dilation // common,
                -((rest + padding - first * dilation) // stride),
            )
        )
    return found


def _launch_conv2d(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result: Tensor,
    geometry: _Geometry,
    padding: tuple[int, int],
    padded: bool,
    relu: bool,
) -> None:
    """Write the convolution of ``source`` into ``result``.

    The weight is [groups * GROUP_OUT, GROUP_IN, height, width], or has groups for itself.
    """
    images, channels, height, width = result.shape
    groups, pixels = channels // geometry.GROUP_OUT, images * height * width
    if weight.dim() == 4:
        weight = weight.unflatten(0, (groups, geometry.GROUP_OUT))
    sizes = groups, geometry.GROUP_IN, pixels, geometry.GROUP_OUT, geometry.products
    tile = config.matmul(source, *sizes, summed=False)
    tiles = -(-pixels // tile.block_m) * -(-geometry.GROUP_OUT // tile.block_n)
    launch(
        device_code("conv").conv2d,
        (tiles * groups,),
        source,
        weight,
        weight if bias is None else bias,
        result,
        images,
        *source.shape[2:],
        height,
        width,
        *padding,
        *source.stride(),
        *weight.stride(),
        *result.stride(),
        **asdict(geometry),
        PADDED=padded,
        HAS_BIAS=bias is not None,
        RELU=relu,
        **_matmul_constants(source, tile),
    )


def _matmul_constants(source: Tensor, tile: config.MatmulConfig) -> dict[str, Any]:
    return {
        "PRECISION": convolution_fp32_precision(),
        "UPCAST": interpreted(source) and source.dtype == torch.bfloat16,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


# What is left of the extents after space_to_depth.
_UNIT = Extents((1, 1), (0, 0, 0, 0), (1, 1), 1)


def _gains_from_depth(input: Tensor, weight: Tensor, extents: Extents) -> bool:
    """Whether to trade the stride for channels: where these are too few for 16-byte loads."""
    strided = min(extents.stride) > 1 and extents.dilation == (1, 1)
    return strided and extents.groups == 1 and weight.shape[1] % 8 != 0 and weight.shape[1] < 16


def _deepened_input(
    input: Tensor, output_shape: Sequence[int], weight: Tensor, extents: Extents
) -> Tensor:
    """What a convolution with stride 1 over the deepened weight reads, padding included."""
    taps = [-(-weight.shape[2 + axis] // extents.stride[axis]) for axis in range(2)]
    size = [output_shape[2 + axis] + taps[axis] - 1 for axis in range(2)]
    left, _, top, _ = extents.padding
    return _space_to_depth(input, extents.stride, size, (top, left))


def _deepened_weight(weight: Tensor, extents: Extents) -> Tensor:
    size = [-(-weight.shape[2 + axis] // extents.stride[axis]) for axis in range(2)]
    return _space_to_depth(weight, extents.stride, size, (0, 0))


def _space_to_depth(
    tensor: Tensor, block: tuple[int, int], size: Sequence[int], padding: tuple[int, int]
) -> Tensor:
    """Blocks of pixels as channels of an image of ``size``, in channels_last.

    The number of channels is rounded up to a multiple of 16, for aligned loads.
    """
    images, channels, height, width = tensor.shape
    depth = -(-channels * block[0] * block[1] // 16) * 16
    result = empty((images, depth, *size), tensor, channels_last=True)
    blocks = config.pointwise(result, depth)
    launch(
        device_code("conv").space_to_depth,
        blocks.programs(result.numel()),
        tensor,
        result,
        result.numel(),
        channels,
        height,
        width,
        *size,
        *padding,
        *tensor.stride(),
        BLOCK_H=block[0],
        BLOCK_W=block[1],
        DEPTH=depth,
        BLOCK=blocks.rows,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )
    return result


def _shallow(deep: Tensor, like: Tensor, block: tuple[int, int]) -> Tensor:
    """What :func:`_space_to_depth` made ``deep`` of, of the shape and in the layout of ``like``."""
    channels, height, width = like.shape[1:]
    parts = deep[:, : channels * block[0] * block[1]].unflatten(1, (channels, *block))
    image = parts.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)[..., :height, :width]
    return torch.empty_like(like).copy_(image)


def split_sum(
    tensor: Tensor, programs: int, length: int, block: int, least_steps: int = 8
) -> tuple[int, int]:
    """Number of partial sums and length of each, a multiple of ``block``."""
    wanted = config.splits(tensor, programs, length, block, least_steps)
    each = -(-length // (wanted * block)) * block
    return -(-length // each), each


def convolution_weight_grad(
    output_grad: Tensor, input: Tensor, weight: Tensor, extents: Extents
) -> Tensor:
    """The weight gradient from that before bias and ReLU, in the weight's layout."""
    if _gains_from_depth(input, weight, extents):
        deep = _deepened_input(input, output_grad.shape, weight, extents)
        size = [-(-weight.shape[2 + axis] // extents.stride[axis]) for axis in range(2)]
        grad = empty((weight.shape[0], deep.shape[1], *size), weight, channels_last=True)
        _launch_weight_grad(output_grad, deep, grad, _UNIT)
        return _shallow(grad, weight, extents.stride)
    weight_grad = empty(weight.shape, weight, channels_last=is_channels_last(weight))
    _launch_weight_grad(output_grad, input, weight_grad, extents)
    return weight_grad


def _launch_weight_grad(
    output_grad: Tensor, input: Tensor, weight_grad: Tensor, extents: Extents
) -> None:
    """Write the weight gradient, in whatever dense layout ``weight_grad`` has."""
    geometry = _Geometry.of(weight_grad, extents)
    images, _, height, width = output_grad.shape
    pixels = images * height * width
    sizes = extents.groups, geometry.GROUP_IN, geometry.GROUP_OUT, geometry.products, pixels
    tile = config.matmul(input, *sizes, summed=True)
    tiles = -(-geometry.GROUP_OUT // tile.block_m) * -(-geometry.products // tile.block_n)
    programs = tiles * extents.groups
    splits, pixels_per_split = split_sum(output_grad, programs, pixels, tile.block_k)
    partial = weight_grad
    if splits > 1:
        partial = empty((splits, weight_grad.numel()), weight_grad, torch.float32)
    launch(
        device_code("conv").conv2d_weight_grad,
        (programs, splits),
        output_grad,
        input,
        partial,
        images,
        *input.shape[2:],
        height,
        width,
        extents.padding[2],
        extents.padding[0],
        pixels_per_split,
        weight_grad.numel(),
        *output_grad.stride(),
        *input.stride(),
        *weight_grad.stride(),
        **asdict(geometry),
        PADDED=extents.padded,
        **_matmul_constants(input, tile),
    )
    if splits > 1:
        sum_partials(partial, weight_grad)


def _epilogue_backward(
    output_grad: Tensor, output: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient before the ReLU (where there was one), and the bias gradient."""
    relu = output is not None
    if not relu and not needs_bias:
        return output_grad, None
    images, channels, height, width = output_grad.shape
    image_pixels = height * width
    channels_last = is_channels_last(output_grad)
    tile = config.column_sum(output_grad, images * image_pixels, channels, channels_last)
    programs = -(-channels // tile.block_n)
    splits, pixels_per_split = split_sum(output_grad, programs, images * image_pixels, tile.block_m)
    masked = output_grad
    if relu:
        masked = empty(output_grad.shape, output_grad, channels_last=channels_last)
    partial = empty((splits, channels), output_grad, torch.float32)
    launch(
        device_code("conv").conv2d_epilogue_backward,
        (programs, splits),
        output_grad,
        output if relu else output_grad,
        masked,
        partial,
        images * image_pixels,
        image_pixels,
        pixels_per_split,
        CHANNELS=channels,
        CHANNELS_LAST=channels_last,
        RELU=relu,
        BIAS=needs_bias,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    if not needs_bias:
        return masked, None
    bias_grad = empty((channels,), output_grad)
    sum_partials(partial, bias_grad)
    return masked, bias_grad


def sum_partials(partial: Tensor, result: Tensor) -> None:
    """Write the sum of ``partial``, float32 [splits, *], over its splits into ``result``."""
    blocks = config.pointwise(result, 1)
    launch(
        device_code("conv").sum_partials,
        blocks.programs(result.numel()),
        partial,
        result,
        result.numel(),
        partial.shape[0],
        BLOCK=blocks.block,
        num_warps=blocks.num_warps,
    )
