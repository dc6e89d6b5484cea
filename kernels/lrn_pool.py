"""Local response normalisation, then max-pooling, in one pass.

Forward: y[o] = max(b[o * stride + t]) over the taps t of a window, where b is the normalised x of
lrn.py, in float32 and never in memory; code[o] is the number of the tap that won, as in pool.py.
Every window lies inside the image: no padding, no dilation.

Backward: the gradient of b gathers those outputs whose code names the pixel, and goes through
lrn.py's formula at once:

    g[i]  = sum(grad[o] for the windows o that hold i, where code[o] names i)
    dx[i] = what lrn.py makes of g and x

After a ReLU (x = relu(a + bias)) also its mask, dx[i] = 0 where x[i] <= 0, and the sum of dx over
all pixels, which is the bias gradient, in partial sums per program.

Programs take eight channels per thread (channels.py). Forward: OUT_ROWS output rows of some
columns, from top to bottom, so that the row that two windows share is normalised once. Backward:
cells of STRIDE_H x STRIDE_W input pixels. The outputs whose windows touch a cell are the same for
all of its pixels, at fixed distances, so each is read once and every tap number is a constant.
Memory sees x, y, code, grad and dx once.
"""

import triton
import triton.language as tl

from .channels import columns, join, load_window, store
from .lrn import input_grad, normalise


@triton.jit
def _rows(
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PER_PROGRAM: tl.constexpr,
    INT64: tl.constexpr,
):
    """Each row's chunk, whether there is such a one, and its place among the program's positions.

    Last comes the number of the program among those of its chunks.
    Programs of the same positions are neighbours, as they share halos.
    """
    blocks: tl.constexpr = (CHUNKS + CHUNKS_PER_PROGRAM - 1) // CHUNKS_PER_PROGRAM
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    row = tl.arange(0, BLOCK // 8)
    chunk = program % blocks * CHUNKS_PER_PROGRAM + row % CHUNKS_PER_PROGRAM
    mask = tl.full(row.shape, True, tl.int1)
    if CHUNKS % CHUNKS_PER_PROGRAM != 0:
        mask = chunk < CHUNKS
    return chunk, mask, row // CHUNKS_PER_PROGRAM, program // blocks


@triton.jit
def _first_channel(chunk, GROUP_SIZE: tl.constexpr):
    per_group: tl.constexpr = (GROUP_SIZE + 7) // 8
    return chunk // per_group * GROUP_SIZE + chunk % per_group * 8


@triton.jit
def _base(
    image,
    row,
    column,
    chunk,
    height,
    width,
    CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Offset of a chunk's first channel at a pixel: PACKED is channels_last, else NCHW."""
    if PACKED:
        return (((image * height + row) * width + column) * (CHANNELS // 8) + chunk) * 8
    first = _first_channel(chunk, GROUP_SIZE)
    return ((image * CHANNELS + first) * height + row) * width + column


@triton.jit
def _row_maximum(
    x_pointer,
    image,
    row,
    out_column,
    chunk,
    mask,
    height,
    width,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Largest normalised value of a window's row, and the number of its tap in the row."""
    HALO: tl.constexpr = triton.next_power_of_2(max(BEFORE, AFTER, 1))
    place = chunk % ((GROUP_SIZE + 7) // 8)
    for tap in tl.static_range(KERNEL_W):
        column = out_column * STRIDE_W + tap
        base = _base(image, row, column, chunk, height, width, CHANNELS, GROUP_SIZE, PACKED)
        parts = load_window(x_pointer, base, place, mask, height * width, GROUP_SIZE, HALO, PACKED)
        x = columns(parts, PACKED)[HALO - BEFORE : HALO + 8 + AFTER]
        value = normalise(x, scale, k, BEFORE, AFTER, BETA)
        if tap == 0:
            best = value
            code = tl.zeros(value.shape, tl.int32)
        else:
            best, code = _larger(best, code, value, tap)
    return best, code


@triton.jit
def _larger(best, code, value, value_code):
    """The first maximum, and over everything the last NaN."""
    wins = (value > best) | (value != value)
    return tl.where(wins, value, best), tl.where(wins, value_code, code)


@triton.jit
def lrn_max_pool_forward(
    x_pointer,
    y_pointer,
    code_pointer,
    images,
    height,
    width,
    out_height,
    out_width,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PER_PROGRAM: tl.constexpr,
    PACKED: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes y, and with CODE the winning taps."""
    chunk, mask, position, block = _rows(BLOCK, CHUNKS, CHUNKS_PER_PROGRAM, INT64)
    position += block * (BLOCK // 8 // CHUNKS_PER_PROGRAM)
    out_column = position % out_width
    image = position // out_width
    mask = mask & (image < images)
    place = chunk % ((GROUP_SIZE + 7) // 8)
    SHARED: tl.constexpr = KERNEL_H == STRIDE_H + 1  # a window's last row is the next one's first
    first = tl.program_id(1) * OUT_ROWS
    last = tl.minimum(first + OUT_ROWS, out_height)
    if SHARED:
        best, code = _row_maximum(
            x_pointer, image, first * STRIDE_H, out_column, chunk, mask, height, width, scale, k,
            CHANNELS, GROUP_SIZE, BEFORE, AFTER, BETA, KERNEL_W, STRIDE_W, PACKED,
        )  # fmt: skip
    for out_row in range(first, last):
        for row in tl.static_range(1 if SHARED else 0, KERNEL_H):
            row_best, row_code = _row_maximum(
                x_pointer, image, out_row * STRIDE_H + row, out_column, chunk, mask, height, width,
                scale, k, CHANNELS, GROUP_SIZE, BEFORE, AFTER, BETA, KERNEL_W, STRIDE_W, PACKED,
            )  # fmt: skip
            if row == 0:
                best, code = row_best, row_code
            else:
                best, code = _larger(best, code, row_best, row_code + row * KERNEL_W)
        base = _base(
            image, out_row, out_column, chunk, out_height, out_width, CHANNELS, GROUP_SIZE, PACKED
        )
        out_inner = out_height * out_width
        store(y_pointer, base, place, mask, out_inner, best, GROUP_SIZE, PACKED)
        if CODE:
            store(code_pointer, base, place, mask, out_inner, code, GROUP_SIZE, PACKED)
        if SHARED:
            best, code = row_best, row_code


@triton.jit
def _cell_backward(
    grad_pointer,
    code_pointer,
    x_pointer,
    dx_pointer,
    cell,
    chunk,
    mask,
    images,
    height,
    width,
    out_height,
    out_width,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RELU: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Writes dx of a cell's pixels, and returns its sum over them as a [ROWS, 8] tile."""
    ROWS: tl.constexpr = cell.shape[0]
    cell_columns = (width + STRIDE_W - 1) // STRIDE_W
    cell_rows = (height + STRIDE_H - 1) // STRIDE_H
    cell_column = cell % cell_columns
    cell_row = cell // cell_columns % cell_rows
    image = cell // cell_columns // cell_rows
    mask = mask & (image < images)
    place = chunk % ((GROUP_SIZE + 7) // 8)
    REACH: tl.constexpr = BEFORE + AFTER
    HALO: tl.constexpr = triton.next_power_of_2(max(BEFORE, AFTER, 1))
    WIDE: tl.constexpr = triton.next_power_of_2(max(REACH, 1))
    WINDOWS_H: tl.constexpr = (KERNEL_H - 1) // STRIDE_H + 1
    WINDOWS_W: tl.constexpr = (KERNEL_W - 1) // STRIDE_W + 1

    grads = ()
    codes = ()
    for window in tl.static_range(WINDOWS_H * WINDOWS_W):
        out_row = cell_row - window // WINDOWS_W
        out_column = cell_column - window % WINDOWS_W
        inside = mask & (out_row >= 0) & (out_row < out_height)
        inside = inside & (out_column >= 0) & (out_column < out_width)
        base = _base(
            image, out_row, out_column, chunk, out_height, out_width, CHANNELS, GROUP_SIZE, PACKED
        )
        out_inner = out_height * out_width
        grad = load_window(grad_pointer, base, place, inside, out_inner, GROUP_SIZE, HALO, PACKED)
        code = load_window(code_pointer, base, place, inside, out_inner, GROUP_SIZE, HALO, PACKED)
        grads = grads + (grad,)
        codes = codes + (code,)

    pixel_sum = tl.zeros((ROWS, 8), tl.float32)
    for pixel in tl.static_range(STRIDE_H * STRIDE_W):
        row = cell_row * STRIDE_H + pixel // STRIDE_W
        column = cell_column * STRIDE_W + pixel % STRIDE_W
        inside = mask & (row < height) & (column < width)
        base = _base(image, row, column, chunk, height, width, CHANNELS, GROUP_SIZE, PACKED)
        inner = height * width
        parts = load_window(x_pointer, base, place, inside, inner, GROUP_SIZE, WIDE, PACKED)
        x = columns(parts, PACKED)[WIDE - REACH : WIDE + 8 + REACH]
        parts = ()
        for part in tl.static_range(len(grads[0])):
            # every pixel has a tap in the window that begins in this cell
            named = codes[0][part] == pixel // STRIDE_W * KERNEL_W + pixel % STRIDE_W
            total = tl.where(named, grads[0][part].to(tl.float32), 0.0)
            for window in tl.static_range(1, WINDOWS_H * WINDOWS_W):
                tap_row = pixel // STRIDE_W + window // WINDOWS_W * STRIDE_H
                tap_column = pixel % STRIDE_W + window % WINDOWS_W * STRIDE_W
                if tap_row < KERNEL_H and tap_column < KERNEL_W:
                    tap = tap_row * KERNEL_W + tap_column
                    named = codes[window][part] == tap
                    total = tl.where(named, total + grads[window][part].to(tl.float32), total)
            parts = parts + (total,)
        grad = columns(parts, PACKED)[HALO - AFTER : HALO + 8 + BEFORE]
        dx = input_grad(x, grad, scale, k, BEFORE, AFTER, BETA)
        if RELU:
            dx = tl.where(join(x[REACH : REACH + 8]) <= 0.0, 0.0, dx)
        store(dx_pointer, base, place, inside, inner, dx, GROUP_SIZE, PACKED)
        pixel_sum += dx
    return pixel_sum


@triton.jit
def lrn_max_pool_backward(
    grad_pointer,
    code_pointer,
    x_pointer,
    dx_pointer,
    partial_pointer,
    images,
    height,
    width,
    out_height,
    out_width,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RELU: tl.constexpr,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PER_PROGRAM: tl.constexpr,
    PACKED: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes dx, with RELU masked; with BIAS also, each program's sums of it over pixels."""
    chunk, mask, place, block = _rows(BLOCK, CHUNKS, CHUNKS_PER_PROGRAM, INT64)
    CELLS: tl.constexpr = BLOCK // 8 // CHUNKS_PER_PROGRAM
    bias_grad = tl.zeros((BLOCK // 8, 8), tl.float32)
    for step in range(STEPS):
        bias_grad += _cell_backward(
            grad_pointer, code_pointer, x_pointer, dx_pointer,
            (block * STEPS + step) * CELLS + place, chunk, mask,
            images, height, width, out_height, out_width, scale, k, CHANNELS, GROUP_SIZE,
            BEFORE, AFTER, BETA, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, RELU, PACKED,
        )  # fmt: skip
    if BIAS:
        # outside the image x is 0, hence behind the ReLU dx as well
        sums = tl.sum(bias_grad.reshape(CELLS, CHUNKS_PER_PROGRAM, 8), axis=0)
        blocks: tl.constexpr = (CHUNKS + CHUNKS_PER_PROGRAM - 1) // CHUNKS_PER_PROGRAM
        chunk = tl.program_id(0) % blocks * CHUNKS_PER_PROGRAM + tl.arange(0, CHUNKS_PER_PROGRAM)
        channel = chunk % ((GROUP_SIZE + 7) // 8) * 8
        channel = channel[:, None] + tl.arange(0, 8)[None, :]
        first = chunk // ((GROUP_SIZE + 7) // 8) * GROUP_SIZE
        target = partial_pointer + block * CHANNELS + first[:, None] + channel
        tl.store(target, sums, mask=(channel < GROUP_SIZE) & (chunk < CHUNKS)[:, None])
