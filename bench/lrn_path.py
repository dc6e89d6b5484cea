"""A kernel's path: LRN forward in channels_last, from the formula as written to memory's speed.

    y[c] = x[c] * (k + s * sum(x[j]**2 for j from c - 2 to c + 2))**-0.75

The paper's window and exponent, and channels that 8 divides; the library's own kernels take any.
Each step is a whole kernel that computes the same; docs/kernel-path.md walks through them with
the compile record of each, and `pytest bench/bench_lrn_path.py` checks and times them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexkern.runtime.launch import launch


@triton.jit
def step_1_formula(
    x_pointer,
    y_pointer,
    count,
    scale,
    k,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """One element per lane, a loop over the window, the power as a power."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    channel = offsets % CHANNELS
    total = tl.zeros((BLOCK,), tl.float32)
    for shift in range(-2, 3):
        inside = mask & (channel + shift >= 0) & (channel + shift < CHANNELS)
        neighbour = tl.load(x_pointer + offsets + shift, mask=inside, other=0.0).to(tl.float32)
        total += neighbour * neighbour
    x = tl.load(x_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.exp2(-0.75 * tl.log2(k + scale * total))
    tl.store(y_pointer + offsets, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def step_2_unrolled(
    x_pointer,
    y_pointer,
    count,
    scale,
    k,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """The loop unrolled: shifts are constants, and no instruction counts them."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    channel = offsets % CHANNELS
    total = tl.zeros((BLOCK,), tl.float32)
    for shift in tl.static_range(-2, 3):
        inside = mask & (channel + shift >= 0) & (channel + shift < CHANNELS)
        neighbour = tl.load(x_pointer + offsets + shift, mask=inside, other=0.0).to(tl.float32)
        total += neighbour * neighbour
    x = tl.load(x_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.exp2(-0.75 * tl.log2(k + scale * total))
    tl.store(y_pointer + offsets, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _negative_three_quarters(d):
    """d**-0.75 = d**-0.5 * (d**0.5)**-0.5, by two reciprocal square roots."""
    root = tl.rsqrt(d)
    return root * tl.rsqrt(d * root)


@triton.jit
def step_3_roots(
    x_pointer,
    y_pointer,
    count,
    scale,
    k,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """No power: two reciprocal square roots."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    channel = offsets % CHANNELS
    total = tl.zeros((BLOCK,), tl.float32)
    for shift in tl.static_range(-2, 3):
        inside = mask & (channel + shift >= 0) & (channel + shift < CHANNELS)
        neighbour = tl.load(x_pointer + offsets + shift, mask=inside, other=0.0).to(tl.float32)
        total += neighbour * neighbour
    x = tl.load(x_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * _negative_three_quarters(k + scale * total)
    tl.store(y_pointer + offsets, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _split(values, ROWS: tl.constexpr):
    """[ROWS, 8] as its eight columns, each in registers of its own."""
    even, odd = tl.split(values.reshape(ROWS, 2, 2, 2))  # by the last bit of the column
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _join(v0, v1, v2, v3, v4, v5, v6, v7, ROWS: tl.constexpr):
    """The inverse of _split."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd).reshape(ROWS, 8)


@triton.jit
def step_4_eight_channels(
    x_pointer,
    y_pointer,
    count,
    scale,
    k,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Eight neighbouring channels per thread: one 16-byte load, and two of 4 bytes beside it.

    Twelve squares and the sums of pairs serve eight windows.
    """
    rows: tl.constexpr = BLOCK // 8
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < count // 8
    part = row % (CHANNELS // 8)
    eight = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    two = row[:, None] * 8 + tl.arange(0, 2)[None, :]
    x = tl.load(x_pointer + eight, mask=mask[:, None], other=0.0).to(tl.float32)
    left = (mask & (part > 0))[:, None]
    before = tl.load(x_pointer + two - 2, mask=left, other=0.0).to(tl.float32)
    right = (mask & (part < CHANNELS // 8 - 1))[:, None]
    after = tl.load(x_pointer + two + 8, mask=right, other=0.0).to(tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7 = _split(x * x, rows)
    a0, a1 = tl.split(before * before)
    b0, b1 = tl.split(after * after)
    s01, s12, s34, s56, s7b = a1 + s0, s1 + s2, s3 + s4, s5 + s6, s7 + b0
    total = _join(
        a0 + s01 + s12,
        s01 + s12 + s3,
        s0 + s12 + s34,
        s12 + s34 + s5,
        s2 + s34 + s56,
        s34 + s56 + s7,
        s4 + s56 + s7b,
        s56 + s7b + b1,
        rows,
    )
    y = x * _negative_three_quarters(k + scale * total)
    tl.store(y_pointer + eight, y.to(y_pointer.dtype.element_ty), mask=mask[:, None])


STEPS: dict[str, Any] = {
    step.__name__: step
    for step in (step_1_formula, step_2_unrolled, step_3_roots, step_4_eight_channels)
}


def run(step: str, x: Tensor, scale: float = 1e-4, k: float = 2.0) -> Tensor:
    """Run one step.

    Args:
        step: A name in STEPS.
        x: [N, C, H, W] in channels_last; 8 divides C.
        scale: Times the sum of squares.
        k: Added to it.

    Raises:
        ValueError: Channels or layout do not fit.
    """
    if x.shape[1] % 8 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"expected channels_last and a multiple of 8 channels, got {list(x.shape)} "
            f"with strides {x.stride()}"
        )
    y = torch.empty_like(x)
    block = 1024
    launch(
        STEPS[step],
        (-(-x.numel() // block),),
        x,
        y,
        x.numel(),
        scale,
        k,
        CHANNELS=x.shape[1],
        BLOCK=block,
    )
    return y
