"""Local response normalisation across channels."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alexkern import reference
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch
from alexkern.runtime.layout import dense, dense_as, is_channels_last, outer_channels_inner


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    alpha_mode: str = "mean",
    groups: int = 1,
) -> Tensor:
    """Divide each value by a power of its neighbourhood's energy across channels.

    ``output[c] = input[c] / (k + s * sum(input[j]**2))**beta`` with j from ``c - size // 2`` to
    ``c + (size - 1) // 2``. The paper (section 3.3) is ``size=5, alpha=1e-4, beta=0.75, k=2,
    alpha_mode="sum"``; its released code has ``alpha_mode="mean"``.

    Args:
        input: [N, C, *], three or more dimensions, NCHW or channels_last (kept; other strides
            are copied once). float32, float16 and bfloat16 have kernels, computing in float32;
            other dtypes run the reference.
        size: channels in a window, at least 1.
        alpha: see ``alpha_mode``.
        beta: the exponent.
        k: the constant, called bias elsewhere.
        alpha_mode: ``"mean"`` sets s to alpha / size, as PyTorch; ``"sum"`` to alpha, as the
            paper.
        groups: number of equal groups of channels whose borders no window crosses (the
            paper's code normalises each GPU's channels alone). Must divide C.

    Returns:
        A tensor like ``input``. Autocast does not change the dtype (PyTorch's op returns
        float32 there).

    Saves for backward: the input. Backward is deterministic; double backward raises.

    Raises:
        ValueError: fewer than three dimensions, unknown ``alpha_mode``, or bad ``groups``.
        RuntimeError: ``size`` below 1.
        TypeError: ``size`` is not an int.
    """
    if input.dim() < 3:
        raise ValueError(
            f"Expected 3D or higher dimensionality input (got {input.dim()} dimensions)"
        )
    if not isinstance(size, int):
        raise TypeError(f"size must be an int, got {size!r}")
    if size < 1:
        raise RuntimeError(f"size should be greater than zero, but got {size}")
    if alpha_mode not in ("mean", "sum"):
        raise ValueError(f"alpha_mode must be 'mean' or 'sum', got {alpha_mode!r}")
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(f"groups must divide the {input.shape[1]} channels, got groups={groups}")
    if input.numel() == 0:
        return input
    scale = alpha / size if alpha_mode == "mean" else alpha
    if not runs_triton("lrn", input):
        return reference.local_response_norm(input, size, scale, beta, k, groups)
    output: Tensor = _LocalResponseNorm.apply(input, size, scale, beta, k, groups)
    return output


class _LocalResponseNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, size: int, scale: float, beta: float, k: float, groups: int
    ) -> Tensor:
        input = dense(input)
        ctx.save_for_backward(input)
        ctx.arguments = size, scale, beta, k, groups
        output = empty(input.shape, input, channels_last=is_channels_last(input))
        _launch(device_code("lrn").lrn_forward, input, (input, output), *ctx.arguments)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        channels_last = is_channels_last(input)
        output_grad = dense_as(output_grad, channels_last)
        # float32 whatever the input: each term is summed `size` times before one rounding
        terms = empty(input.shape, input, torch.float32, channels_last)
        input_grad = empty(input.shape, input, channels_last=channels_last)
        tensors = (output_grad, input, terms)
        _launch(device_code("lrn").lrn_backward_terms, input, tensors, *ctx.arguments)
        _launch(device_code("lrn").lrn_backward, input, (*tensors, input_grad), *ctx.arguments)
        return input_grad, None, None, None, None, None


def _launch(
    kernel: Any,
    input: Tensor,
    tensors: tuple[Tensor, ...],
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
) -> None:
    _, channels, inner = outer_channels_inner(input)
    reach = channels // groups - 1  # a wider window holds no more channels
    blocks = config.pointwise(input, input.numel())
    launch(
        kernel,
        blocks.programs(input.numel()),
        *tensors,
        input.numel(),
        inner,
        scale,
        k,
        CHANNELS=channels,
        GROUPS=groups,
        BEFORE=min(size // 2, reach),
        AFTER=min((size - 1) // 2, reach),
        BETA=beta,
        BLOCK=blocks.block,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )
