"""What surrounds the matrix products of linear + bias + ReLU + dropout.

The products are the vendor's, and so is the bias of forward, which rides in its product:

    z = x @ weight^T + bias                                             vendor
    y = relu(z) * (scale where kept, else 0)                            linear_epilogue

Backward, for the gradient g of y; h is the gradient of z:

    h = 0 where y <= 0, else g * scale                                  linear_epilogue_backward
    dbias[u] = sum over rows r of h[r, u]                               linear_epilogue_backward
    dx = h @ weight,   dweight = h^T @ x                                vendor

Behind a ReLU the output itself tells where the gradient passes: a unit that is dropped, or that
the ReLU closed, is 0. So h needs no random bits, and cannot disagree with forward; at a NaN it
passes. Without a ReLU h = g * (scale where kept, else 0), with the mask of forward drawn again.
The mask is that of kernels/dropout.py for y. dbias is left as partial sums in float32 for
kernels/conv.py's sum_partials.
"""

import triton
import triton.language as tl

from .dropout import _keeps, _words_of_counters, _words_of_places


@triton.jit
def linear_epilogue(
    y_pointer,
    seed_pointer,
    count,
    columns,
    index_offset,
    row_stride,
    threshold,
    scale,
    RELU: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Replace z by y in place: read once, written once. Without DROP all are kept."""
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    # VECTOR divides count: so written, VECTOR neighbours share their mask visibly
    mask = offsets // VECTOR < count // VECTOR
    y = tl.load(y_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, unlike maximum
    factor = tl.cast(scale, tl.float32)
    if DROP:
        keep = _keeps(
            program,
            offsets,
            seed_pointer,
            columns,
            columns,
            index_offset,
            row_stride,
            threshold,
            False,
            ALIGNED,
            BLOCK,
        )
        factor = tl.where(keep, factor, 0.0)
    tl.store(y_pointer + offsets, (y * factor).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def linear_epilogue_backward(
    grad_pointer,
    y_pointer,
    seed_pointer,
    masked_pointer,
    partial_pointer,
    rows,
    rows_per_split,
    columns,
    index_offset,
    row_stride,
    threshold,
    scale,
    UNITS: tl.constexpr,
    RELU: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT64: tl.constexpr,
):
    """Write h, and with BIAS one partial sum of dbias; g, and y with RELU, are read once.

    Program axis 0 counts blocks of units, axis 1 splits of the rows. DROP, without RELU, draws
    the mask again; it is ALIGNED if also 4 divides UNITS.
    """
    split = tl.program_id(1)
    if INT64:
        split = split.to(tl.int64)
    first_unit = tl.program_id(0) * BLOCK_N
    unit = first_unit + tl.arange(0, BLOCK_N)
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, rows)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        offsets = row[:, None] * UNITS + unit[None, :]
        mask = (row < end)[:, None] & (unit < UNITS)[None, :]
        grad = tl.load(grad_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        factor = tl.cast(scale, tl.float32)
        if DROP:
            seed = tl.load(seed_pointer)
            if ALIGNED:
                quad = first_unit // 4 + tl.arange(0, BLOCK_N // 4)
                counter = row.to(tl.int64)[:, None] * (UNITS // 4) + quad[None, :]
                words = _words_of_counters(counter + index_offset // 4, seed)
                word = tl.reshape(words, (BLOCK_M, BLOCK_N))
            else:
                place = offsets.to(tl.int64)
                word = _words_of_places(
                    place, seed, columns, columns, index_offset, row_stride, False
                )
            factor = tl.where(word.to(tl.int64) >= threshold, factor, 0.0)
        grad *= factor
        if RELU:
            y = tl.load(y_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(y <= 0.0, 0.0, grad)
        tl.store(masked_pointer + offsets, grad.to(masked_pointer.dtype.element_ty), mask=mask)
        total += grad
    if BIAS:
        partial = tl.sum(total, axis=0)
        tl.store(partial_pointer + split * UNITS + unit, partial, mask=unit < UNITS)
