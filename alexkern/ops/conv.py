"""Convolution, bias and ReLU as one op."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alexkern import reference
from alexkern.ops import conv_passes
from alexkern.ops.arguments import autocast, check_alike, pair
from alexkern.ops.conv_passes import (
    EXTENTS,
    Extents,
    convolution_flops,
    convolve,
    fake_gradients,
    split_sum,
    sum_partials,
)
from alexkern.runtime import config
from alexkern.runtime.backend import current_backend, runs_triton
from alexkern.runtime.launch import device_code, empty, launch
from alexkern.runtime.layout import dense, dense_as, is_channels_last
from alexkern.runtime.operator import Operator


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

    Where padding is multiplied as zeros, an infinite or NaN weight gives NaN, and where it is left
    out it does not: that depends on who computes, as between PyTorch's own convolutions.

    Returns:
        [N, C_out, H_out, W_out], or without N for a 3-D input.

    Saves for backward: input, weight, and with ``"relu"`` the output, each only if a gradient
    needs it. Gradients that nobody asks for are not computed. Backward is deterministic, but for
    the vendor's under ``auto``, which follow torch's flags; double backward raises.

    Raises:
        RuntimeError: what PyTorch refuses: shapes, dtypes or extents that do not fit.
        TypeError: an extent is not an int.
        ValueError: unknown ``activation``.
    """
    if activation not in ("relu", "none"):
        raise ValueError(f"activation must be 'relu' or 'none', got {activation!r}")
    input, weight, bias, extents = checked(input, weight, bias, stride, padding, dilation, groups)
    if input.numel() == 0 or not runs_triton(input):
        return reference.conv2d_bias_relu(input, weight, bias, *extents, activation)
    batch = dense(input if input.dim() == 4 else input.unsqueeze(0))
    relu, backend = activation == "relu", current_backend()
    output: Tensor = _forward(batch, dense(weight), bias, *extents, relu, backend)
    return output if input.dim() == 4 else output.squeeze(0)


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
    check_alike(input, weight, bias)
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


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, *numbers: Any) -> Tensor:
    *extents, relu, backend = numbers
    choose = conv_passes.chooser(input, backend)
    return convolve(dense(input), dense(weight), bias, Extents(*extents), relu, choose)


def _convolve_backward(
    output_grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    input_shape: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
    *numbers: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *extents, backend = numbers
    if output is not None:
        output = dense_as(output, channels_last)
    output_grad, bias_grad = _epilogue_backward(
        dense_as(output_grad, channels_last), output, needs[2]
    )
    input_grad, weight_grad = conv_passes.gradients(
        output_grad, input, weight, input_shape, channels_last, needs, Extents(*extents), backend
    )
    return input_grad, weight_grad, bias_grad


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
    pixels = images * image_pixels
    wanted = config.column_splits(output_grad, programs, pixels, tile.block_m, least_steps=4)
    splits, pixels_per_split = split_sum(wanted, pixels, tile.block_m)
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
        pixels,
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


def _save(context: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *extents, relu, backend = arguments
    needs_input, needs_weight, _ = context.needs_input_grad[:3]
    context.save_for_backward(
        input if needs_weight else None,
        weight if needs_weight or needs_input else None,
        output if relu else None,
    )
    context.input_shape, context.channels_last = input.shape, is_channels_last(input)
    context.numbers = *extents, backend


def _gradients(context: Any, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    needs = context.needs_input_grad[:3]
    shape = context.input_shape, context.channels_last
    grads: tuple[Tensor, Tensor, Tensor] = _backward(
        output_grad, *context.saved_tensors, *shape, needs, *context.numbers
    )
    return grads


_backward = Operator(
    "conv2d_bias_relu_backward(Tensor output_grad, Tensor? input, Tensor? weight, Tensor? output, "
    f"SymInt[4] input_shape, bool channels_last, bool[3] needs, {EXTENTS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _convolve_backward,
    fake=lambda output_grad, input, weight, output, shape, channels_last, needs, *_: fake_gradients(
        output_grad, weight, shape, channels_last, needs
    ),
    flops=lambda output_grad, input, weight, output, shape, channels_last, needs, *_, out_val: (
        sum(needs[:2]) * convolution_flops(output_grad, weight)
    ),
)
_forward = Operator(
    f"conv2d_bias_relu(Tensor input, Tensor weight, Tensor? bias, {EXTENTS}, bool relu, "
    "str backend) -> Tensor",
    _convolve,
    fake=lambda input, weight, bias, *numbers: conv_passes.output_like(
        input, weight, Extents(*numbers[:4])
    ),
    save=_save,
    backward=_gradients,
    autocast=autocast,
    flops=lambda input, weight, *_, out_val: convolution_flops(out_val, weight),
)
