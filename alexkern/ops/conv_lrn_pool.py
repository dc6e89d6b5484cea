"""Convolution, bias, ReLU, local response normalisation and max-pooling as one op."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alexkern.ops import conv, conv_passes
from alexkern.ops.arguments import autocast
from alexkern.ops.conv_passes import Extents
from alexkern.ops.lrn import Normalisation, checked_normalisation
from alexkern.ops.lrn_pool import (
    fits_one_pass,
    lrn_max_pool2d,
    normalise_and_pool,
    parted,
    pooled_like,
    pooled_normalisation_grad,
)
from alexkern.ops.pool import Windows, checked_windows
from alexkern.runtime.backend import current_backend, runs_triton
from alexkern.runtime.layout import dense, dense_as, is_channels_last
from alexkern.runtime.operator import Operator, backward_may_follow


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
        operands = batch, dense(weight), bias
        save_code = backward_may_follow(*operands)
        numbers = *extents, *normalisation, *windows, save_code, current_backend()
        output, *_ = _forward(*operands, *numbers)
    return output if input.dim() == 4 else output.squeeze(0)


def _layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, activation between ReLU and normalisation, and the taps that won."""
    extents, normalisation, windows, save_code, backend = _parted(numbers)
    choose = conv_passes.chooser(input, backend)
    activation = conv_passes.convolve(dense(input), dense(weight), bias, extents, True, choose)
    output, code = normalise_and_pool(activation, normalisation, windows, save_code)
    return output, activation, code


def _layer_backward(
    output_grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    activation: Tensor,
    code: Tensor,
    input_shape: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
    *numbers: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    extents, normalisation, windows, _, backend = _parted(numbers)
    grad, bias_grad = pooled_normalisation_grad(
        output_grad,
        dense_as(activation, channels_last),
        dense_as(code, channels_last),
        normalisation,
        windows,
        relu=True,
        bias=needs[2],
    )
    if bias_grad is not None:
        bias_grad = bias_grad.to(grad.dtype)
    input_grad, weight_grad = conv_passes.gradients(
        grad, input, weight, input_shape, channels_last, needs, extents, backend
    )
    return input_grad, weight_grad, bias_grad


def _parted(numbers: Sequence[Any]) -> tuple[Extents, Normalisation, Windows, bool, str]:
    split = len(Extents._fields)
    *both, save_code, backend = numbers[split:]
    return Extents(*numbers[:split]), *parted(both), save_code, backend


def _save(
    context: Any, arguments: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    input, weight, _, *context.numbers = arguments
    _, activation, code = outputs
    context.mark_non_differentiable(activation, *([] if code is None else [code]))
    if not context.numbers[-2]:
        return  # nobody wants a gradient, or backward says what is missing
    needs_input, needs_weight = context.needs_input_grad[:2]
    context.save_for_backward(
        input if needs_weight else None,
        weight if needs_input or needs_weight else None,
        activation,
        code,
    )
    context.input_shape, context.channels_last = input.shape, is_channels_last(input)


def _gradients(context: Any, output_grad: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor]:
    saved = context.saved_tensors
    if not saved:
        raise RuntimeError(f"alexkern::{_NAME} kept nothing for backward: save_code was False")
    needs = context.needs_input_grad[:3]
    shape = context.input_shape, context.channels_last
    grads: tuple[Tensor, Tensor, Tensor] = _backward(
        output_grad, *saved, *shape, needs, *context.numbers
    )
    return grads


def _fake_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    extents, _, windows, save_code, _ = _parted(numbers)
    activation = conv_passes.output_like(input, weight, extents)
    output, code = pooled_like(activation, windows, save_code)
    return output, activation, code


_NAME = "conv2d_bias_relu_lrn_max_pool2d"
_TAIL = (
    "SymInt size, float scale, float beta, float k, SymInt norm_groups, SymInt[2] kernel_size, "
    "SymInt[2] pool_stride, SymInt[2] pool_padding, SymInt[2] pool_dilation, SymInt[2] output_size"
)
_NUMBERS = f"{conv_passes.EXTENTS}, {_TAIL}, bool save_code, str backend"
_backward = Operator(
    f"{_NAME}_backward(Tensor output_grad, Tensor? input, Tensor? weight, Tensor activation, "
    f"Tensor code, SymInt[4] input_shape, bool channels_last, bool[3] needs, {_NUMBERS}) "
    "-> (Tensor, Tensor, Tensor)",
    _layer_backward,
    fake=lambda grad, input, weight, activation, code, shape, channels_last, needs, *_: (
        conv_passes.fake_gradients(activation, weight, shape, channels_last, needs)
    ),
    flops=lambda grad, input, weight, activation, code, shape, channels_last, needs, *_, out_val: (
        sum(needs[:2]) * conv_passes.convolution_flops(activation, weight)
    ),
)
_forward = Operator(
    f"{_NAME}(Tensor input, Tensor weight, Tensor? bias, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    _layer,
    fake=_fake_layer,
    save=_save,
    backward=_gradients,
    autocast=autocast,
    flops=lambda input, weight, *_, out_val: conv_passes.convolution_flops(out_val[1], weight),
)
