"""Convolution, bias, ReLU, local response normalisation and max-pooling as one op."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alexkern.ops import conv, conv_passes
from alexkern.ops.lrn import Normalisation, checked_normalisation
from alexkern.ops.lrn_pool import (
    fits_one_pass,
    lrn_max_pool2d,
    normalise_and_pool,
    pooled_normalisation_grad,
)
from alexkern.ops.pool import Windows, checked_windows
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.layout import dense, is_channels_last


def conv2d_bias_relu_lrn_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    size: int,
    kernel_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    alpha_mode: str = "mean",
    norm_groups: int = 1,
) -> Tensor:
    """``max_pool2d(local_response_norm(relu(conv2d(input, weight) + bias)))``.

    The paper's layers 1 and 2 whole (section 3.5). One node of the autograd graph: its backward
    passes once over the activation between ReLU and normalisation, which yields the gradient
    before the ReLU and the bias gradient together.

    Args:
        input: as for :func:`alexkern.ops.conv2d_bias_relu`, up to ``groups``.
        weight: [C_out, C // groups, height, width] of the input's dtype.
        bias: [C_out] or None.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.
        size: as for :func:`alexkern.ops.lrn_max_pool2d`, as are all that follow.
        kernel_size: of the pooling windows.
        pool_stride: ``kernel_size`` if None or empty.
        pool_padding: of the pooling windows.
        pool_dilation: of the pooling windows.
        ceil_mode: of the pooling windows.
        alpha: of the normalisation.
        beta: of the normalisation.
        k: of the normalisation.
        alpha_mode: of the normalisation.
        norm_groups: groups of channels whose borders no window of the normalisation crosses.

    Where :func:`alexkern.ops.lrn_max_pool2d` takes two passes, this is that op after
    :func:`alexkern.ops.conv2d_bias_relu`.

    Returns:
        [N, C_out, H_out, W_out], or without N for a 3-D input.

    Saves for backward: input, weight, the activation before the normalisation, and one byte per
    output. Backward is deterministic where the convolution's is; double backward raises.

    Raises:
        RuntimeError, TypeError, ValueError: what the ops that it is made of refuse.
    """
    input, weight, bias, extents = conv.checked(
        input, weight, bias, stride, padding, dilation, groups
    )
    batch = dense(input if input.dim() == 4 else input.unsqueeze(0))
    shape = (batch.shape[0], weight.shape[0], *extents.output_size(batch, weight))
    pool = kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode
    norm: dict[str, Any] = {"alpha": alpha, "beta": beta, "k": k, "alpha_mode": alpha_mode}
    norm["groups"] = norm_groups
    windows = checked_windows(shape, *pool)
    normalisation = checked_normalisation(shape, size, **norm)
    channels_last = is_channels_last(batch)
    one_pass = fits_one_pass(shape, channels_last, normalisation, windows)
    if batch.numel() == 0 or not one_pass or not runs_triton(batch):
        activation = conv.conv2d_bias_relu(batch, weight, bias, *extents)
        output = lrn_max_pool2d(activation, size, *pool, **norm)
    else:
        operands = [batch, weight] if bias is None else [batch, weight, bias]
        save = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
        plan = _Plan(extents, normalisation, windows, conv_passes.chooser(batch), save)
        output = _Conv2dBiasReLULRNMaxPool2d.apply(batch, weight, bias, plan)
    return output if input.dim() == 4 else output.squeeze(0)


class _Plan(NamedTuple):
    """``save``: there will be a backward."""

    extents: conv_passes.Extents
    normalisation: Normalisation
    windows: Windows
    choose: conv_passes.Chooser
    save: bool


class _Conv2dBiasReLULRNMaxPool2d(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan
    ) -> Tensor:
        weight = dense(weight)
        activation = conv_passes.convolve(input, weight, bias, plan.extents, True, plan.choose)
        output, code = normalise_and_pool(activation, plan.normalisation, plan.windows, plan.save)
        if plan.save:
            needs_input, needs_weight = ctx.needs_input_grad[:2]
            ctx.save_for_backward(
                input if needs_weight else None,
                weight if needs_input or needs_weight else None,
                activation,
                code,
            )
            ctx.plan, ctx.input_shape = plan, input.shape
            ctx.channels_last = is_channels_last(input)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, activation, code = ctx.saved_tensors
        plan = ctx.plan
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad, bias_grad = pooled_normalisation_grad(
            output_grad, activation, code, plan.normalisation, plan.windows,
            relu=True, bias=needs_bias,
        )  # fmt: skip
        if bias_grad is not None:
            bias_grad = bias_grad.to(grad.dtype)
        input_grad = weight_grad = None
        if needs_input:
            input_grad = conv_passes.convolution_input_grad(
                grad, weight, ctx.input_shape, plan.extents, ctx.channels_last, plan.choose
            )
        if needs_weight:
            weight_grad = conv_passes.convolution_weight_grad(
                grad, input, weight, plan.extents, plan.choose
            )
        return input_grad, weight_grad, bias_grad, None
