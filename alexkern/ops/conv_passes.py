"""The three passes of a convolution, and partial sums: what conv.py and its fused layers launch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexkern.runtime import config, dispatch, vendor
from alexkern.runtime.launch import (
    device_code,
    empty,
    interpreted,
    launch,
    like,
    tensor_descriptor,
)
from alexkern.runtime.layout import (
    convolution_fp32_precision,
    dense,
    dense_as,
    is_channels_last,
    outer_channels_inner,
)


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


# of an operator, in the order of :class:`Extents`
EXTENTS = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"

Chooser = Callable[[dispatch.Convolution], dispatch.Choice]


def chooser(tensor: Tensor, backend: str) -> Chooser:
    """What chooses on a tensor's device."""
    return partial(dispatch.choose, device=tensor.device, backend=backend)


def _problem(
    direction: str,
    weight: Tensor,
    input_shape: Sequence[int],
    extents: Extents,
    channels_last: bool,
) -> dispatch.Convolution:
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype == "float32" and convolution_fp32_precision() == "tf32":
        dtype = "tf32"
    return dispatch.Convolution(
        direction, dtype, channels_last, tuple(input_shape), tuple(weight.shape), *extents
    )


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    extents: Extents,
    relu: bool,
    choose: Chooser,
) -> Tensor:
    """The output for dense operands, in the input's layout."""
    bias = None if bias is None else bias.contiguous()
    channels_last = is_channels_last(input)
    choice = choose(_problem("forward", weight, input.shape, extents, channels_last))
    if choice.vendor:
        output = vendor.convolve(input, weight, extents, choice.vendor)
        return finish(output, bias, relu)
    output = output_like(input, weight, extents)
    if _gains_from_depth(weight, extents):
        input = _deepened_input(input, output.shape, weight, extents)
        weight, extents = _deepened_weight(weight, extents), _UNIT
    if is_channels_last(input):
        weight = dense_as(weight, channels_last=True)  # neighbours in products and in memory
    geometry = _Geometry.of(weight, extents)
    padding = extents.padding[2], extents.padding[0]
    _launch_conv2d(
        input, weight, bias, output, geometry, padding, extents.padded, relu, choice.tile
    )
    return output


def finish(output: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Add the bias to a convolution and apply the ReLU, in place."""
    if bias is None and not relu:
        return output
    _, channels, inner = outer_channels_inner(output)
    blocks = config.pointwise(output, channels if inner == 1 else inner)
    launch(
        device_code("conv").conv2d_epilogue,
        blocks.programs(output.numel()),
        output,
        output if bias is None else bias,
        output.numel(),
        inner,
        CHANNELS=channels,
        HAS_BIAS=bias is not None,
        RELU=relu,
        BLOCK=blocks.rows,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )
    return output


def convolution_input_grad(
    output_grad: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    extents: Extents,
    channels_last: bool,
    choose: Chooser,
) -> Tensor:
    """The input gradient from that before bias and ReLU.

    Pixels that leave the same rest when divided by the stride are reached by the same taps, every
    so many: for these it is a convolution of the output gradient with stride 1.
    """
    choice = choose(_problem("input_grad", weight, input_shape, extents, channels_last))
    if choice.vendor:
        gradient = vendor.input_grad(output_grad, weight, input_shape, extents, choice.vendor)
        return dense_as(gradient, channels_last)
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
            _launch_conv2d(
                output_grad, reaching, None, part, geometry, padding, True, False, choice.tile
            )
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
    tile: config.MatmulConfig | None,
) -> None:
    """Write the convolution of ``source`` into ``result``.

    The weight is [groups * GROUP_OUT, GROUP_IN, height, width], or has groups for itself.
    """
    images, channels, height, width = result.shape
    groups, pixels = channels // geometry.GROUP_OUT, images * height * width
    if weight.dim() == 4:
        weight = weight.unflatten(0, (groups, geometry.GROUP_OUT))
    sizes = groups, geometry.GROUP_IN, pixels, geometry.GROUP_OUT, geometry.products
    tile = _usable(tile, source, weight) or config.matmul(source, result, *sizes, summed=False)
    if tile.boxes:
        _launch_boxes(source, weight, bias, result, geometry, padding, relu, tile)
        return
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
        **vars(geometry),
        PADDED=padded,
        HAS_BIAS=bias is not None,
        RELU=relu,
        **_blocks(tile),
        **_options(source, tile),
    )


def _usable(tile: config.MatmulConfig | None, *operands: Tensor) -> config.MatmulConfig | None:
    """A measured tile, unless it loads boxes and an operand is a view that begins anywhere."""
    if tile and tile.boxes and any(operand.data_ptr() % 16 for operand in operands):
        return None
    return tile


def _launch_boxes(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result: Tensor,
    geometry: _Geometry,
    padding: tuple[int, int],
    relu: bool,
    tile: config.MatmulConfig,
) -> None:
    """As :func:`_launch_conv2d`, by tensor descriptors."""
    groups, group_out, group_in, *_ = weight.shape
    turned = weight.stride(1) == 1  # the input gradient's, which multiplies by the other channels
    if (geometry.STRIDE_H, geometry.STRIDE_W) != (1, 1) or group_in % tile.block_k:
        raise RuntimeError(
            f"boxes need a stride of 1 and a multiple of {tile.block_k} channels per group, got "
            f"{geometry}"
        )
    rows = groups * (group_in if turned else group_out)
    matrix = (weight.transpose(1, 2) if turned else weight).permute(0, 1, 3, 4, 2)
    matrix = matrix.reshape(rows, -1)
    block = (tile.block_k, tile.block_n) if turned else (tile.block_n, tile.block_k)
    batch, _, height, width = result.shape
    images = min(tile.block_m, config.power_of_two(batch))
    columns = tile.block_m // images
    tiles = -(-group_out // tile.block_n) * -(-batch // images) * height * -(-width // columns)
    constants = dict(vars(geometry))
    del constants["STRIDE_H"], constants["STRIDE_W"]
    launch(
        device_code("conv").conv2d_boxes,
        (tiles * groups,),
        _pixel_boxes(source, images, columns, tile.block_k),
        tensor_descriptor(matrix, block),
        weight if bias is None else bias,
        result,
        batch,
        *source.shape[2:],
        height,
        width,
        *padding,
        *result.stride(),
        **constants,
        TURNED=turned,
        HAS_BIAS=bias is not None,
        RELU=relu,
        IMAGES=images,
        COLUMNS=columns,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **_options(source, tile),
    )


def _pixel_boxes(image: Tensor, images: int, columns: int, channels: int) -> Any:
    """Boxes of one row of a channels_last tensor."""
    pixels = image.movedim(1, -1)
    if pixels.is_contiguous():  # also where an extent of 1 has a stride that says nothing
        pixels = pixels.reshape(-1).view(pixels.shape)
    return tensor_descriptor(pixels, (images, 1, columns, channels))


def _options(source: Tensor, tile: config.MatmulConfig) -> dict[str, Any]:
    return {
        "PRECISION": convolution_fp32_precision(),
        "UPCAST": interpreted(source) and source.dtype == torch.bfloat16,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _blocks(tile: config.MatmulConfig) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


# What is left of the extents after space_to_depth.
_UNIT = Extents((1, 1), (0, 0, 0, 0), (1, 1), 1)


def _gains_from_depth(weight: Tensor, extents: Extents) -> bool:
    """Whether to trade the stride for channels: where these are too few for 16-byte loads."""
    channels, *kernel = weight.shape[1:]
    strided = min(extents.stride) > 1 and extents.dilation == (1, 1) and extents.groups == 1
    reaching = all(k >= s for k, s in zip(kernel, extents.stride, strict=True))
    return strided and reaching and channels % 8 != 0 and channels < 16


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


def convolution_weight_grad(
    output_grad: Tensor, input: Tensor, weight: Tensor, extents: Extents, choose: Chooser
) -> Tensor:
    """The weight gradient from that before bias and ReLU, in the weight's layout."""
    channels_last = is_channels_last(input)
    choice = choose(_problem("weight_grad", weight, input.shape, extents, channels_last))
    if choice.vendor:
        return vendor.weight_grad(output_grad, input, weight, extents, choice.vendor)
    if _gains_from_depth(weight, extents):
        deep = _deepened_input(input, output_grad.shape, weight, extents)
        size = [-(-weight.shape[2 + axis] // extents.stride[axis]) for axis in range(2)]
        grad = empty((weight.shape[0], deep.shape[1], *size), weight, channels_last=True)
        _launch_weight_grad(output_grad, deep, grad, _UNIT, choice.tile)
        return _shallow(grad, weight, extents.stride)
    weight_grad = empty(weight.shape, weight, channels_last=is_channels_last(weight))
    _launch_weight_grad(output_grad, input, weight_grad, extents, choice.tile)
    return weight_grad


def _launch_weight_grad(
    output_grad: Tensor,
    input: Tensor,
    weight_grad: Tensor,
    extents: Extents,
    tile: config.MatmulConfig | None,
) -> None:
    """Write the weight gradient, in whatever dense layout ``weight_grad`` has."""
    geometry = _Geometry.of(weight_grad, extents)
    images, _, height, width = output_grad.shape
    pixels = images * height * width
    sizes = extents.groups, geometry.GROUP_IN, geometry.GROUP_OUT, geometry.products, pixels
    tile = _usable(tile, input, output_grad) or config.matmul(
        input, output_grad, *sizes, summed=True
    )
    programs = extents.groups * -(-geometry.GROUP_OUT // tile.block_m)
    if tile.boxes:  # each of one tap
        taps = geometry.KERNEL_H * geometry.KERNEL_W
        programs *= -(-geometry.GROUP_IN // tile.block_n) * taps
    else:
        programs *= -(-geometry.products // tile.block_n)
    wanted = config.product_splits(output_grad, programs, pixels, tile.block_k)
    splits, pixels_per_split = split_sum(wanted, pixels, tile.block_k)
    partial = weight_grad
    if splits > 1:
        partial = empty((splits, weight_grad.numel()), weight_grad, torch.float32)
    extent = (images, *input.shape[2:], height, width, extents.padding[2], extents.padding[0])
    if tile.boxes:
        launch(
            device_code("conv").conv2d_weight_grad_boxes,
            (programs, splits),
            _pixel_boxes(output_grad, tile.block_k, 1, tile.block_m),
            _pixel_boxes(input, tile.block_k, 1, tile.block_n),
            partial,
            *extent,
            weight_grad.numel(),
            *weight_grad.stride(),
            **vars(geometry),
            **_blocks(tile),
            **_options(input, tile),
        )
    else:
        launch(
            device_code("conv").conv2d_weight_grad,
            (programs, splits),
            output_grad,
            input,
            partial,
            *extent,
            pixels_per_split,
            weight_grad.numel(),
            *output_grad.stride(),
            *input.stride(),
            *weight_grad.stride(),
            **vars(geometry),
            PADDED=extents.padded,
            **_blocks(tile),
            **_options(input, tile),
        )
    if splits > 1:
        sum_partials(partial, weight_grad)


def split_sum(wanted: int, length: int, block: int) -> tuple[int, int]:
    """Number of partial sums, ``wanted`` at most, and length of each, a multiple of ``block``."""
    each = -(-length // (wanted * block)) * block
    return -(-length // each), each


def sum_partials(partial: Tensor, result: Tensor) -> None:
    """Write the sum of ``partial``, float32 [splits, *], over its splits into ``result``."""
    rows, block = config.partial_sums(result, partial.shape[0])
    launch(
        device_code("conv").sum_partials,
        (-(-result.numel() // block),),
        partial,
        result,
        result.numel(),
        partial.shape[0],
        ROWS=rows,
        BLOCK=block,
    )


def gradients(
    output_grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    input_shape: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
    extents: Extents,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Those of input and weight that are needed, from that before bias and ReLU."""
    choose = chooser(output_grad, backend)
    input_grad = weight_grad = None
    if weight is not None:
        weight = dense(weight)
    if needs[0] and weight is not None:
        input_grad = convolution_input_grad(
            output_grad, weight, input_shape, extents, channels_last, choose
        )
    if needs[1] and weight is not None and input is not None:
        input = dense_as(input, channels_last)
        weight_grad = convolution_weight_grad(output_grad, input, weight, extents, choose)
    return input_grad, weight_grad


def output_like(input: Tensor, weight: Tensor, extents: Extents) -> Tensor:
    """Uninitialised: a convolution's output."""
    shape = (input.shape[0], weight.shape[0], *extents.output_size(input, weight))
    return empty(shape, input, channels_last=is_channels_last(input))


def fake_gradients(
    output_grad: Tensor,
    weight: Tensor | None,
    input_shape: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Uninitialised: the gradients of input, weight and bias that are needed."""
    input_grad = weight_grad = bias_grad = None
    if needs[0]:
        input_grad = empty(input_shape, output_grad, channels_last=channels_last)
    if needs[1] and weight is not None:
        weight_grad = like(weight)
    if needs[2]:
        bias_grad = output_grad.new_empty(output_grad.shape[1])
    return input_grad, weight_grad, bias_grad


def convolution_flops(output: Tensor, weight: Tensor) -> int:
    """Of one pass."""
    return 2 * output.numel() * weight[0].numel()
