"""A fully connected layer: linear, bias, ReLU and dropout as one op."""

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alexkern import reference
from alexkern.ops.arguments import autocast, check_alike
from alexkern.ops.conv_passes import split_sum, sum_partials
from alexkern.ops.dropout import check_arguments, check_floating_point, draw_seed, kept_scale
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch
from alexkern.runtime.operator import Operator


def linear_bias_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    activation: str = "relu",
    *,
    mode: str = "inverted",
    seed: Tensor | None = None,
    index_offset: int = 0,
    row_stride: int | None = None,
) -> Tensor:
    """``dropout(relu(linear(input, weight, bias)))``, a hidden layer (paper section 4.2).

    The matrix products are torch's own, whose switches for precision hold; one kernel does the
    rest. The mask is that of :func:`alexkern.ops.dropout` on a tensor of the output's shape, for
    the same ``seed``, ``index_offset`` and ``row_stride``.

    Args:
        input: [*, in_features]. float32, float16 and bfloat16 have kernels; other dtypes run the
            reference. Under autocast the operands are cast, as PyTorch casts those of a linear.
        weight: [out_features, in_features] of the input's dtype.
        bias: [out_features] or None.
        p: probability of dropping a unit, in [0, 1].
        training: if False, nothing is dropped.
        activation: ``"relu"`` or ``"none"``.
        mode: ``"inverted"`` multiplies kept units by 1 / (1 - p) in training and does nothing
            otherwise; ``"paper"`` keeps them as they are in training and multiplies by 1 - p
            otherwise.
        seed: int64 tensor of one element on the input's device. None draws one from torch's
            generator, as :func:`alexkern.ops.dropout` does, and only if units are dropped.
        index_offset: global index of the first unit, for a shard of a larger output.
        row_stride: global units from one row (dimension 0) of the output to the next; the number
            of units per row if None.

    Returns:
        [*, out_features], dense in row-major order.

    Saves for backward: input and weight, each only if a gradient needs it; with ``"relu"`` the
    output, which tells what was dropped, else the seed (8 bytes). Gradients that nobody asks for
    are not computed. Behind a ReLU the gradient of a unit passes, times the factor of a kept one,
    where the output is NaN, and is zero where it is zero, whatever arrives there. As the output
    is kept, it must not be changed in place before backward. Backward is deterministic where
    torch's matrix products are; double backward raises.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, integers to drop from, or a ``p`` that is
            NaN.
        ValueError: unknown ``activation`` or ``mode``, ``p`` outside [0, 1], negative
            ``index_offset`` or ``row_stride``, or a bad ``seed``.
    """
    if activation not in ("relu", "none"):
        raise ValueError(f"activation must be 'relu' or 'none', got {activation!r}")
    check_arguments(input, p, mode, seed, index_offset, row_stride)
    _check_operands(input, weight, bias)
    input, weight, bias = autocast(input, weight, bias)
    check_alike(input, weight, bias)
    shape = (*input.shape[:-1], weight.shape[0])
    scale = kept_scale(p, training, mode)
    if training and p > 0.0 and prod(shape) > 0:
        check_floating_point(input)
        seed = draw_seed(input.device) if seed is None else seed.view(())
    else:
        seed = None  # nothing is dropped
    only_product = seed is None and scale == 1.0 and activation == "none"
    if only_product or prod(shape) == 0 or not runs_triton(input):
        return reference.linear_bias_relu_dropout(
            input, weight, bias, activation, p, scale, seed, index_offset, row_stride
        )
    columns = prod(shape[1:])
    epilogue = _Epilogue(
        relu=activation == "relu",
        scale=scale,
        threshold=reference.dropout_threshold(p),
        columns=columns,
        index_offset=index_offset,
        row_stride=columns if row_stride is None else row_stride,
    )
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    output: Tensor = _forward(rows, weight, bias, seed, *epilogue)
    return output if input.dim() == 2 else output.view(shape)


def _check_operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise RuntimeError(f"Expected a 2D weight, but got weight of size {list(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected input of size "
            f"[*, {weight.shape[1]}], but got {list(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with "
            f"{weight.shape[0]} elements, but got bias of size {list(bias.shape)} instead"
        )


class _Epilogue(NamedTuple):
    """What follows the product; where its elements stand in the global mask."""

    relu: bool
    scale: float
    threshold: int
    columns: int
    index_offset: int
    row_stride: int

    @property
    def aligned(self) -> bool:
        return self.row_stride == self.columns and self.index_offset % 4 == 0

    @property
    def arguments(self) -> tuple[int | float, ...]:
        """In the kernels' order."""
        return self.columns, self.index_offset, self.row_stride, self.threshold, self.scale


def _connect(
    input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, *numbers: Any
) -> Tensor:
    output = F.linear(input, weight, bias)
    _launch_forward(output, seed, _Epilogue(*numbers))
    return output


def _connect_backward(
    output_grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    seed: Tensor | None,
    needs_bias: bool,
    *numbers: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    masked, bias_grad = _launch_backward(
        output_grad.contiguous(), output, seed, _Epilogue(*numbers), needs_bias
    )
    input_grad = None if weight is None else masked @ weight
    weight_grad = None if input is None else masked.t() @ input
    return input_grad, weight_grad, bias_grad


def _launch_forward(output: Tensor, seed: Tensor | None, epilogue: _Epilogue) -> None:
    """Replace the product by the op's output, in place."""
    blocks = config.pointwise(output, output.numel())
    launch(
        device_code("linear").linear_epilogue,
        blocks.programs(output.numel()),
        output,
        output if seed is None else seed,  # a pointer that the kernel does not use
        output.numel(),
        *epilogue.arguments,
        RELU=epilogue.relu,
        DROP=seed is not None,
        ALIGNED=epilogue.aligned,
        BLOCK=blocks.block,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )


def _launch_backward(
    output_grad: Tensor,
    output: Tensor | None,
    seed: Tensor | None,
    epilogue: _Epilogue,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the product, and the bias gradient."""
    rows, units = output_grad.shape
    tile = config.column_sum(output_grad, rows, units, channels_last=True)
    programs = -(-units // tile.block_n)
    wanted = config.column_splits(output_grad, programs, rows, tile.block_m, least_steps=1)
    splits, rows_per_split = split_sum(wanted, rows, tile.block_m)
    masked = empty(output_grad.shape, output_grad)
    partial = empty((splits, units), output_grad, torch.float32)
    launch(
        device_code("linear").linear_epilogue_backward,
        (programs, splits),
        output_grad,
        output_grad if output is None else output,
        output_grad if seed is None else seed,
        masked,
        partial,
        rows,
        rows_per_split,
        *epilogue.arguments,
        UNITS=units,
        RELU=epilogue.relu,
        DROP=seed is not None,
        ALIGNED=epilogue.aligned and units % 4 == 0,
        BIAS=needs_bias,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    if not needs_bias:
        return masked, None
    bias_grad = empty((units,), output_grad)
    sum_partials(partial, bias_grad)
    return masked, bias_grad


def _save(context: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, seed, *context.numbers = arguments
    needs_input, needs_weight, *_ = context.needs_input_grad
    relu = context.numbers[0]
    context.save_for_backward(
        input if needs_weight else None,
        weight if needs_input else None,
        output if relu else None,
        None if relu else seed,
    )


def _gradients(context: Any, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    needs_bias = context.needs_input_grad[2]
    grads: tuple[Tensor, Tensor, Tensor] = _backward(
        output_grad, *context.saved_tensors, needs_bias, *context.numbers
    )
    return grads


def _fake_gradients(
    output_grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    seed: Tensor | None,
    needs_bias: bool,
    *numbers: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, units = output_grad.shape
    return (
        None if weight is None else output_grad.new_empty(rows, weight.shape[1]),
        None if input is None else output_grad.new_empty(units, input.shape[1]),
        output_grad.new_empty(units) if needs_bias else None,
    )


def _product_flops(output: Tensor, *factors: Tensor | None) -> int:
    """Of the products that these go into, beside a tensor of the output's shape."""
    return sum(2 * output.numel() * t.shape[1] for t in factors if t is not None)


_EPILOGUE = (
    "bool relu, float scale, int threshold, SymInt columns, SymInt index_offset, SymInt row_stride"
)
_backward = Operator(
    "linear_bias_relu_dropout_backward(Tensor output_grad, Tensor? input, Tensor? weight, "
    f"Tensor? output, Tensor? seed, bool needs_bias, {_EPILOGUE}) -> (Tensor, Tensor, Tensor)",
    _connect_backward,
    fake=_fake_gradients,
    flops=lambda output_grad, input, weight, *_, out_val: _product_flops(
        output_grad, input, weight
    ),
)
_forward = Operator(
    "linear_bias_relu_dropout(Tensor input, Tensor weight, Tensor? bias, Tensor? seed, "
    f"{_EPILOGUE}) -> Tensor",
    _connect,
    fake=lambda input, weight, *_: input.new_empty(input.shape[0], weight.shape[0]),
    save=_save,
    backward=_gradients,
    autocast=autocast,
    flops=lambda input, *_, out_val: _product_flops(out_val, input),
)
