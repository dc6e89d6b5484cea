"""Each op's definition in plain PyTorch: the specification.

It runs for CPU tensors, for dtypes that have no kernel, and under the ``torch`` backend.
Half-precision input is computed in float32 and rounded once at the end, as the kernels do.
Argument checks and the contracts are in :mod:`alexkern.ops`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d_bias_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """``relu(conv2d(input, weight) + bias)``; padding is (left, right, top, bottom)."""
    left, right, top, bottom = padding
    if left == right and top == bottom:
        output = F.conv2d(input, weight, bias, stride, (top, left), dilation, groups)
    else:
        output = F.conv2d(F.pad(input, padding), weight, bias, stride, 0, dilation, groups)
    return output.relu() if activation == "relu" else output


def local_response_norm(
    input: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> Tensor:
    """``x[c] * (k + scale * sum(x[j]**2 for j in window(c)))**-beta`` along dimension 1.

    The window of channel c is [c - size // 2, c + (size - 1) // 2], cut at the borders of c's
    group (paper section 3.3; for even sizes, which the paper does not use, as PyTorch).
    """
    value = input.unflatten(1, (groups, -1)).to(_compute_dtype(input))
    channels = value.shape[2]
    before, after = min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)
    square = F.pad(value * value, (0, 0) * (value.dim() - 3) + (before, after))
    window_sum = square.narrow(2, 0, channels)
    for shift in range(1, before + after + 1):
        window_sum = window_sum + square.narrow(2, shift, channels)
    output: Tensor = value / (k + scale * window_sum) ** beta
    return output.flatten(1, 2).to(input.dtype if input.is_floating_point() else output.dtype)


def max_pool2d(
    input: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
    return_indices: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """PyTorch's own max-pool: first maximum in row-major order, NaN propagates."""
    if return_indices:
        return F.max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def lrn_max_pool2d(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """Both, one after the other, rounded once."""
    value = input.to(_compute_dtype(input))
    normalised = local_response_norm(value, size, scale, beta, k, groups)
    output = F.max_pool2d(normalised, kernel_size, stride, padding, dilation, ceil_mode)
    return output.to(input.dtype) if input.is_floating_point() else output


def dropout(
    input: Tensor,
    p: float,
    scale: float,
    seed: Tensor,
    index_offset: int = 0,
    row_stride: int | None = None,
) -> Tensor:
    """``input * scale`` where kept and ``input * 0`` where dropped, by :func:`dropout_keeps`.

    A product, not a selection: a dropped NaN or infinity gives NaN, as in PyTorch.
    """
    keeps = dropout_keeps(input.shape, p, seed, index_offset, row_stride)
    value = input.to(_compute_dtype(input))
    return (value * (keeps.to(value.dtype) * scale)).to(input.dtype)


def linear_bias_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    p: float,
    scale: float,
    seed: Tensor | None,
    index_offset: int,
    row_stride: int | None,
) -> Tensor:
    """``dropout(relu(input @ weight.T + bias))``; without a seed, only scaled."""
    output = F.linear(input, weight, bias)
    output = output.relu() if activation == "relu" else output
    if seed is None:
        return output if scale == 1.0 else output * scale
    return dropout(output, p, scale, seed, index_offset, row_stride)


def dropout_keeps(
    shape: Sequence[int], p: float, seed: Tensor, index_offset: int, row_stride: int | None
) -> Tensor:
    """Boolean mask of the kept elements: the one definition of dropout's random bits.

    The element in row r (dimension 0) and column c (all others, row-major) has index
    i = index_offset + r * row_stride + c; row_stride defaults to the number of columns.
    It uses word i % 4 of Philox4x32-10(counter=i // 4, key=seed), and is dropped if and only
    if that word is below round(p * 2**32).
    """
    count = 1
    for extent in shape:
        count *= extent
    columns = count // shape[0] if shape and shape[0] else 1
    index = torch.arange(count, device=seed.device)
    row, column = index.div(columns, rounding_mode="floor"), index % columns
    index = index_offset + row * (columns if row_stride is None else row_stride) + column
    words = torch.stack(philox4x32(index.div(4, rounding_mode="floor"), seed))
    word = words.gather(0, (index % 4)[None])[0]
    return (word >= dropout_threshold(p)).view(tuple(shape))


def dropout_threshold(p: float) -> int:
    """Words below it are dropped: ``round(p * 2**32)``."""
    return round(p * 2**32)


def philox4x32(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (as int64) of Philox4x32-10 per counter (Salmon et al. 2011).

    Args:
        counter: int64, the low 64 bits of the 128-bit counter; the high ones are zero.
        seed: int64 scalar tensor, the 64-bit key (a negative seed is its two's complement).
    """
    mask = 0xFFFFFFFF
    zero = torch.zeros_like(counter)
    words = (counter & mask, (counter >> 32) & mask, zero, zero)
    key0, key1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = _multiply_32(words[0], 0xD2511F53)
        high1, low1 = _multiply_32(words[2], 0xCD9E8D57)
        words = (high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0)
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return words


def _multiply_32(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product, without overflow of int64."""
    upper, lower = value * (factor >> 16), value * (factor & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & 0xFFFFFFFF


def augment(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: float,
    shift: Tensor | None,
    dtype: torch.dtype,
    padding: tuple[int, int, int, int],
    space_to_depth: int,
) -> Tensor:
    """``((pixel - mean) + shift) * (1 / std)`` of each image's crop, mirrored where flips say so.

    Corners are clamped to those whose crop, of the size of ``mean``, lies within the image. The
    crops are then padded with zeros, and blocks of pixels become channels.
    """
    batch, height, width, _ = images.shape
    top, left = (
        corners[:, axis, None].clamp(0, images.shape[axis + 1] - mean.shape[axis])
        + torch.arange(mean.shape[axis], device=images.device)
        for axis in (0, 1)
    )
    column = left.flip(1).where(flips[:, None], left)
    row = torch.arange(batch, device=images.device)[:, None] * height + top
    place = row[:, :, None] * width + column[:, None, :]
    pixels = images.flatten(0, 2).index_select(0, place.flatten()).unflatten(0, place.shape)
    value = pixels.float() - mean
    if shift is not None:
        value += shift[:, None, None, :]
    value *= 1.0 / std
    output = value.to(dtype)
    if any(padding):
        output = F.pad(output, (0, 0, *padding))
    # F.pixel_unshuffle, which gives another shape for an empty batch
    blocks = output.unflatten(2, (-1, space_to_depth)).unflatten(1, (-1, space_to_depth))
    packed: Tensor = blocks.permute(0, 1, 3, 5, 2, 4).flatten(3)
    return packed.permute(0, 3, 1, 2)


def krizhevsky_sgd(
    weights: list[Tensor],
    velocities: list[Tensor],
    gradients: list[Tensor],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``v <- momentum * v - lr * (weight_decay * w + g / grad_scale)``, then ``w <- w + v``.

    The rule of the paper's section 5, on weights and velocities in place. Nothing changes where
    ``found_inf`` is not zero, which no one waits to know.
    """
    changes = [g.to(w.dtype, copy=True) for g, w in zip(gradients, weights, strict=True)]
    if grad_scale is not None:
        torch._foreach_div_(changes, grad_scale)
    torch._foreach_add_(changes, weights, alpha=weight_decay)
    torch._foreach_mul_(changes, lr)
    before = [] if found_inf is None else [t.clone() for t in (*weights, *velocities)]
    torch._foreach_mul_(velocities, momentum)
    torch._foreach_sub_(velocities, changes)
    torch._foreach_add_(weights, velocities)
    if found_inf is not None:
        for new, old in zip((*weights, *velocities), before, strict=True):
            new.copy_(torch.where(found_inf == 0, new, old))


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32
