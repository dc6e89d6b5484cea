"""Max-pooling with overlapping windows (paper section 3.4).

Forward, for output pixel o of one channel; taps t = (r, s) in row-major order:

    y[o] = max(x[o * stride - padding + t * dilation]) over the taps inside the image
    code[o] = the number r * KERNEL_W + s of the tap that won

The first maximum wins a tie and the last NaN wins over everything, as in PyTorch. A window
without a NaN or a value above -inf gives -inf and its first tap inside the image.

Backward is a gather: input pixel i belongs to the windows o with i = o * stride - padding +
t * dilation, and takes the gradient of those whose code is that very t, in a fixed order:
no atomics, the same bits every time.

    dx[i] = sum(g[o] for o with code[o] == t)

Layout: any dense tensor is [outer, H, W, inner] in memory. NCHW has inner = 1 and outer =
N * C, channels_last has inner = C and outer = N, so one kernel serves both. A program owns
BLOCK * VECTOR consecutive elements, of the output in forward and of the input in backward;
VECTOR divides inner, so that the pixel is the same along a vector.
"""

import triton
import triton.language as tl


@triton.jit
def _pixels(
    count,
    height,
    width,
    inner,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Locate a program's elements of a dense [outer, height, width, inner] tensor.

    Returns offsets [BLOCK, VECTOR] and their mask [BLOCK, 1]; the image (outer), row and column
    [BLOCK, 1]; and the number of each vector among its pixel's inner // VECTOR [BLOCK, 1].
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    vector = (program * BLOCK + tl.arange(0, BLOCK))[:, None]
    pixel = vector // (inner // VECTOR)
    column = pixel % width
    row = (pixel // width) % height
    image = pixel // (width * height)
    mask = vector < count // VECTOR
    return _lanes(vector, VECTOR), mask, image, row, column, vector % (inner // VECTOR)


@triton.jit
def _lanes(vector, VECTOR: tl.constexpr):
    """Offsets of the elements of vectors; the product shows the compiler their alignment."""
    return vector * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def max_pool_forward(
    x_pointer,
    y_pointer,
    code_pointer,
    index_pointer,
    count,
    height,
    width,
    out_height,
    out_width,
    inner,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CODE: tl.constexpr,
    INDICES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes y; with CODE the winning taps, with INDICES PyTorch's row * width + column."""
    offsets, mask, image, out_row, out_column, part = _pixels(
        count, out_height, out_width, inner, BLOCK, VECTOR, INT64
    )
    best = tl.full(offsets.shape, float("-inf"), tl.float32)
    code = tl.full(offsets.shape, -1, tl.int32)
    for tap in range(KERNEL_H * KERNEL_W):
        row = out_row * STRIDE_H - PADDING_H + (tap // KERNEL_W) * DILATION_H
        column = out_column * STRIDE_W - PADDING_W + (tap % KERNEL_W) * DILATION_W
        inside = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel = (image * height + row) * width + column
        source = _lanes(pixel * (inner // VECTOR) + part, VECTOR)
        x = tl.load(x_pointer + source, mask=inside, other=float("-inf")).to(tl.float32)
        wins = inside & ((x > best) | (x != x) | (code < 0))
        best = tl.where(wins, x, best)
        code = tl.where(wins, tap, code)
    tl.store(y_pointer + offsets, best.to(y_pointer.dtype.element_ty), mask=mask)
    if CODE:
        # A window with no tap inside the image (possible with dilation) keeps code -1 here; the
        # last code value stands for it, which in a full window is a tap outside the image.
        tl.store(code_pointer + offsets, code.to(code_pointer.dtype.element_ty), mask=mask)
    if INDICES:
        row = out_row * STRIDE_H - PADDING_H + (code // KERNEL_W) * DILATION_H
        column = out_column * STRIDE_W - PADDING_W + (code % KERNEL_W) * DILATION_W
        tl.store(index_pointer + offsets, (row * width + column).to(tl.int64), mask=mask)


@triton.jit
def max_pool_backward(
    grad_pointer,
    code_pointer,
    dx_pointer,
    count,
    height,
    width,
    out_height,
    out_width,
    inner,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes dx; each output's gradient and code is read by the pixels of its window."""
    offsets, mask, image, row, column, part = _pixels(
        count, height, width, inner, BLOCK, VECTOR, INT64
    )
    # At most this many windows along an axis hold a given pixel.
    windows_h: tl.constexpr = ((KERNEL_H - 1) * DILATION_H) // STRIDE_H + 1
    windows_w: tl.constexpr = ((KERNEL_W - 1) * DILATION_W) // STRIDE_W + 1
    total = tl.zeros(offsets.shape, tl.float32)
    for window in range(windows_h * windows_w):
        out_row = (row + PADDING_H) // STRIDE_H - window // windows_w
        out_column = (column + PADDING_W) // STRIDE_W - window % windows_w
        down = row + PADDING_H - out_row * STRIDE_H
        right = column + PADDING_W - out_column * STRIDE_W
        tap_row = down // DILATION_H
        tap_column = right // DILATION_W
        inside = mask & (out_row >= 0) & (out_row < out_height) & (tap_row < KERNEL_H)
        inside = inside & (out_column >= 0) & (out_column < out_width) & (tap_column < KERNEL_W)
        inside = inside & (down % DILATION_H == 0) & (right % DILATION_W == 0)
        pixel = (image * out_height + out_row) * out_width + out_column
        source = _lanes(pixel * (inner // VECTOR) + part, VECTOR)
        code = tl.load(code_pointer + source, mask=inside, other=0).to(tl.int32)
        grad = tl.load(grad_pointer + source, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside & (code == tap_row * KERNEL_W + tap_column), grad, 0.0)
    tl.store(dx_pointer + offsets, total.to(dx_pointer.dtype.element_ty), mask=mask)
