"""Max-pooling with overlapping windows (paper section 3.4).

Forward, for output pixel o of one channel; taps t = (r, s) in row-major order:

    y[o] = max(x[o * stride - padding + t * dilation]) over the taps inside the image
    code[o] = the number r * KERNEL_W + s of the tap that won

The first maximum wins a tie and the last NaN wins over everything, as in PyTorch. A window
without a NaN or a value above -inf gives -inf and its first tap inside the image.

Backward is a gather: input pixel i belongs to the windows o with i = o * stride - padding +
t * dilation, and takes the gradient of those whose code is that very t, in the order of o:
no atomics, the same bits every time.

    dx[i] = sum(g[o] for o with code[o] == t)

Cut the padded image into cells of one stride by one stride. Tap t of window o lies in cell
o + t * dilation // stride, at pixel t * dilation % stride of it. So each tap belongs to one pixel
of a cell and to one window relative to the cell, both known to the compiler, and a lane that owns
a cell loads each gradient and code once: with 3x3 windows and stride 2, four of them serve four
pixels in nine comparisons with constants.

Layout: any dense tensor is [outer, H, W, inner] in memory. NCHW has inner = 1 and outer =
N * C, channels_last has inner = C and outer = N, so one kernel serves both. A program owns BLOCK
output pixels (forward), cells or pixels (backward) in that order, times VECTOR neighbours in
inner, which VECTOR divides.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(height, width, inner, BLOCK: tl.constexpr, VECTOR: tl.constexpr, INT64: tl.constexpr):
    """Where a program's vectors are in [outer, height, width, inner // VECTOR].

    Returns the coordinates, [BLOCK, 1] each; outer may be past the end.
    """
    # unsigned, which makes divisions shorter
    UNSIGNED: tl.constexpr = tl.uint64 if INT64 else tl.uint32
    SIGNED: tl.constexpr = tl.int64 if INT64 else tl.int32
    parts = tl.cast(inner // VECTOR, UNSIGNED)
    height = tl.cast(height, UNSIGNED)
    width = tl.cast(width, UNSIGNED)
    vector = tl.program_id(0).to(UNSIGNED) * BLOCK + tl.arange(0, BLOCK)[:, None].to(UNSIGNED)
    pixel = vector // parts
    line = pixel // width
    image = (line // height).to(SIGNED)
    row = (line % height).to(SIGNED)
    return image, row, (pixel % width).to(SIGNED), (vector % parts).to(SIGNED)


@triton.jit
def _offsets(image, row, column, part, height, width, inner, VECTOR: tl.constexpr):
    """Offsets [BLOCK, VECTOR] of vectors; the product shows the compiler their alignment."""
    pixel = (image * height + row) * width + column
    return (pixel * (inner // VECTOR) + part) * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _step(inner, VECTOR: tl.constexpr, INT64: tl.constexpr):
    """Elements from one pixel to the next, in a way that shows the compiler their alignment."""
    return tl.cast(inner // VECTOR, tl.int64 if INT64 else tl.int32) * VECTOR


@triton.jit
def max_pool_forward(
    x_pointer,
    y_pointer,
    code_pointer,
    index_pointer,
    outer,
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
    INSIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    CODE: tl.constexpr,
    INDICES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes y; with CODE the winning taps, with INDICES PyTorch's row * width + column.

    INSIDE says that no window reaches over the image's edges, UNROLL how many taps to unroll.
    """
    image, out_row, out_column, part = _locate(out_height, out_width, inner, BLOCK, VECTOR, INT64)
    mask = image < outer
    row = out_row * STRIDE_H - PADDING_H
    column = out_column * STRIDE_W - PADDING_W
    corner = _offsets(image, row, column, part, height, width, inner, VECTOR)
    step = _step(inner, VECTOR, INT64)
    best = tl.full(corner.shape, float("-inf"), tl.float32)
    code = tl.zeros(corner.shape, tl.int32)
    if not INSIDE:
        # The first tap inside the image. A window without one (possible with dilation) gets some
        # code, which is harmless: all of its taps are outside, where there is no gradient.
        tap_row = (tl.maximum(-row, 0) + DILATION_H - 1) // DILATION_H
        tap_column = (tl.maximum(-column, 0) + DILATION_W - 1) // DILATION_W
        code += (tap_row * KERNEL_W + tap_column).to(tl.int32)
    for tap in tl.range(KERNEL_H * KERNEL_W, loop_unroll_factor=UNROLL):
        down = tap // KERNEL_W * DILATION_H
        right = tap % KERNEL_W * DILATION_W
        source = x_pointer + corner + (down * width + right) * step
        if INSIDE:
            x = tl.load(source, mask=mask).to(tl.float32)
        else:
            inside = mask & (row + down >= 0) & (row + down < height)
            inside = inside & (column + right >= 0) & (column + right < width)
            x = tl.load(source, mask=inside, other=float("-inf")).to(tl.float32)
        wins = (x > best) | (x != x)
        best = tl.where(wins, x, best)
        code = tl.where(wins, tap, code)
    offsets = _offsets(image, out_row, out_column, part, out_height, out_width, inner, VECTOR)
    tl.store(y_pointer + offsets, best.to(y_pointer.dtype.element_ty), mask=mask)
    if CODE:
        tl.store(code_pointer + offsets, code.to(code_pointer.dtype.element_ty), mask=mask)
    if INDICES:
        row += code // KERNEL_W * DILATION_H
        column += code % KERNEL_W * DILATION_W
        tl.store(index_pointer + offsets, (row * width + column).to(tl.int64), mask=mask)


@triton.jit
def max_pool_backward(
    grad_pointer,
    code_pointer,
    dx_pointer,
    outer,
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
    """Writes dx by cells, with all taps unrolled: for small windows and strides."""
    image, cell_row, cell_column, part = _locate(
        tl.cdiv(height + PADDING_H % STRIDE_H, STRIDE_H),
        tl.cdiv(width + PADDING_W % STRIDE_W, STRIDE_W),
        inner,
        BLOCK,
        VECTOR,
        INT64,
    )
    mask = image < outer
    step = _step(inner, VECTOR, INT64)
    # the window that starts with the cell, whole strides of padding aside
    last_row = cell_row + PADDING_H // STRIDE_H
    last_column = cell_column + PADDING_W // STRIDE_W
    last = _offsets(image, last_row, last_column, part, out_height, out_width, inner, VECTOR)
    sums = ()
    for pixel in tl.static_range(STRIDE_H * STRIDE_W):
        total = tl.zeros(last.shape, tl.float32)
        for tap in tl.static_range(KERNEL_H * KERNEL_W - 1, -1, -1):
            if (
                tap // KERNEL_W * DILATION_H % STRIDE_H == pixel // STRIDE_W
                and tap % KERNEL_W * DILATION_W % STRIDE_W == pixel % STRIDE_W
            ):
                up = tap // KERNEL_W * DILATION_H // STRIDE_H
                left = tap % KERNEL_W * DILATION_W // STRIDE_W
                inside = mask & (last_row >= up) & (last_row - up < out_height)
                inside = inside & (last_column >= left) & (last_column - left < out_width)
                source = last - (up * out_width + left) * step
                # the compiler merges the loads of taps that share a window
                code = tl.load(code_pointer + source, mask=inside, other=255)
                grad = tl.load(grad_pointer + source, mask=inside).to(tl.float32)
                total = tl.where(code == tap, total + grad, total)
        sums += (total,)
    row = cell_row * STRIDE_H - PADDING_H % STRIDE_H
    column = cell_column * STRIDE_W - PADDING_W % STRIDE_W
    corner = _offsets(image, row, column, part, height, width, inner, VECTOR)
    for pixel in tl.static_range(STRIDE_H * STRIDE_W):
        down = pixel // STRIDE_W
        right = pixel % STRIDE_W
        inside = mask & (row + down >= 0) & (row + down < height)
        inside = inside & (column + right >= 0) & (column + right < width)
        dx = sums[pixel].to(dx_pointer.dtype.element_ty)
        tl.store(dx_pointer + corner + (down * width + right) * step, dx, mask=inside)


@triton.jit
def max_pool_backward_looped(
    grad_pointer,
    code_pointer,
    dx_pointer,
    outer,
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
    """Writes dx by pixels, with a loop over the windows that may hold one: for any geometry."""
    image, row, column, part = _locate(height, width, inner, BLOCK, VECTOR, INT64)
    mask = image < outer
    step = _step(inner, VECTOR, INT64)
    windows_h: tl.constexpr = ((KERNEL_H - 1) * DILATION_H) // STRIDE_H + 1
    windows_w: tl.constexpr = ((KERNEL_W - 1) * DILATION_W) // STRIDE_W + 1
    first_row = (row + PADDING_H) // STRIDE_H - (windows_h - 1)
    first_column = (column + PADDING_W) // STRIDE_W - (windows_w - 1)
    first = _offsets(image, first_row, first_column, part, out_height, out_width, inner, VECTOR)
    total = tl.zeros(first.shape, tl.float32)
    for window in range(windows_h * windows_w):
        out_row = first_row + window // windows_w
        out_column = first_column + window % windows_w
        down = row + PADDING_H - out_row * STRIDE_H
        right = column + PADDING_W - out_column * STRIDE_W
        inside = mask & (out_row >= 0) & (out_row < out_height)
        inside = inside & (out_column >= 0) & (out_column < out_width)
        inside = inside & (down < KERNEL_H * DILATION_H) & (right < KERNEL_W * DILATION_W)
        inside = inside & (down % DILATION_H == 0) & (right % DILATION_W == 0)
        tap = down // DILATION_H * KERNEL_W + right // DILATION_W
        source = first + (window // windows_w * out_width + window % windows_w) * step
        code = tl.load(code_pointer + source, mask=inside, other=0).to(tl.int32)
        grad = tl.load(grad_pointer + source, mask=inside, other=0.0).to(tl.float32)
        total = tl.where(code == tap, total + grad, total)
    offsets = _offsets(image, row, column, part, height, width, inner, VECTOR)
    tl.store(dx_pointer + offsets, total.to(dx_pointer.dtype.element_ty), mask=mask)
