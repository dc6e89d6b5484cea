"""Convolution + bias + ReLU as implicit matrix products, forward and backward.

Forward, in group q with output channels co and input channels ci of that group:

    y[n, co, o] = relu(bias[co] + sum over taps t, ci of
                       x[n, ci, o * stride - padding + t * dilation] * weight[co, ci, t])

Backward, for the gradient g of y; h is g where the ReLU was open (y > 0, or y is NaN):

    h = 0 where y <= 0, else g                                       conv2d_epilogue_backward
    dbias[co] = sum over n, o of h[n, co, o]                         conv2d_epilogue_backward
    dx[n, ci, i] = sum over t, co of h[n, co, o] * weight[co, ci, t]              conv2d
        where o * stride = i + padding - t * dilation has an integer solution
    dweight[co, ci, t] = sum over n, o of                            conv2d_weight_grad
        h[n, co, o] * x[n, ci, o * stride - padding + t * dilation]

`conv2d` computes y and dx alike: both gather pixels by taps and multiply by the weight, the
second with the roles of ci and co exchanged (TRANSPOSED). Nothing is unfolded in memory: rows
of the left matrix are pixels, its columns are (tap, channel), addressed on the fly. All strides
are arguments, so NCHW and channels_last need no copy. Sums are in float32; long sums over pixels
are split into partial sums that `sum_partials` adds in a fixed order, without atomics.
"""

import triton
import triton.language as tl


@triton.jit
def _split_pixel(pixel, height, width):
    """Image, row and column of a pixel's number in [images, height, width]."""
    return pixel // (height * width), (pixel // width) % height, pixel % width


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Add left @ right to total, in float32."""
    if UPCAST:  # Triton's interpreter multiplies the raw bits of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def conv2d(
    source_pointer,
    weight_pointer,
    bias_pointer,
    result_pointer,
    images,
    source_height,
    source_width,
    height,
    width,
    source_stride_n,
    source_stride_c,
    source_stride_h,
    source_stride_w,
    weight_stride_out,
    weight_stride_in,
    weight_stride_h,
    weight_stride_w,
    result_stride_n,
    result_stride_c,
    result_stride_h,
    result_stride_w,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_TOP: tl.constexpr,
    PADDING_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
):
    """One tile of the result: BLOCK_M pixels of [images, height, width] by BLOCK_N channels.

    GROUP_IN and GROUP_OUT are the channels per group of the source and of the result of this
    product: the convolution's input and output, exchanged if TRANSPOSED.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    pixels = images * height * width
    tiles_n: tl.constexpr = (GROUP_OUT + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    group = program // (tiles_n * tiles_m)
    pixel = (program // tiles_n) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    out_channel = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    image, row, column = _split_pixel(pixel, height, width)
    if TRANSPOSED:
        row_origin = row + PADDING_TOP
        column_origin = column + PADDING_LEFT
        weight_stride_k = weight_stride_out
        weight_stride_n = weight_stride_in
        weight_pointer += group * GROUP_IN * weight_stride_out
    else:
        row_origin = row * STRIDE_H - PADDING_TOP
        column_origin = column * STRIDE_W - PADDING_LEFT
        weight_stride_k = weight_stride_in
        weight_stride_n = weight_stride_out
        weight_pointer += group * GROUP_OUT * weight_stride_out
    source_pointer += group * GROUP_IN * source_stride_c
    image_offset = image * source_stride_n

    products: tl.constexpr = KERNEL_H * KERNEL_W * GROUP_IN
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, products, BLOCK_K):
        product = start + tl.arange(0, BLOCK_K)
        channel = (product % GROUP_IN).to(pixel.dtype)  # 64 bits if offsets need them
        tap_row = product // GROUP_IN // KERNEL_W
        tap_column = product // GROUP_IN % KERNEL_W
        if TRANSPOSED:
            row_steps = row_origin[:, None] - (tap_row * DILATION_H)[None, :]
            column_steps = column_origin[:, None] - (tap_column * DILATION_W)[None, :]
            from_row = row_steps // STRIDE_H
            from_column = column_steps // STRIDE_W
            inside = (row_steps >= 0) & (column_steps >= 0)
            inside = inside & (row_steps % STRIDE_H == 0) & (column_steps % STRIDE_W == 0)
        else:
            from_row = row_origin[:, None] + (tap_row * DILATION_H)[None, :]
            from_column = column_origin[:, None] + (tap_column * DILATION_W)[None, :]
            inside = (from_row >= 0) & (from_column >= 0)
        inside = inside & (from_row < source_height) & (from_column < source_width)
        inside = inside & (pixel < pixels)[:, None] & (product < products)[None, :]
        source_offsets = (
            image_offset[:, None]
            + from_row * source_stride_h
            + from_column * source_stride_w
            + (channel * source_stride_c)[None, :]
        )
        left = tl.load(source_pointer + source_offsets, mask=inside, other=0.0)
        weight_offsets = (
            channel * weight_stride_k + tap_row * weight_stride_h + tap_column * weight_stride_w
        )
        right = tl.load(
            weight_pointer + weight_offsets[:, None] + (out_channel * weight_stride_n)[None, :],
            mask=(product < products)[:, None] & (out_channel < GROUP_OUT)[None, :],
            other=0.0,
        )
        total = _dot(left, right, total, PRECISION, UPCAST)

    if HAS_BIAS:
        bias = tl.load(
            bias_pointer + group * GROUP_OUT + out_channel, mask=out_channel < GROUP_OUT, other=0.0
        )
        total += bias.to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)  # keeps NaN, unlike maximum
    pixel_offsets = image * result_stride_n + row * result_stride_h + column * result_stride_w
    channel_offsets = (group * GROUP_OUT + out_channel) * result_stride_c
    tl.store(
        result_pointer + pixel_offsets[:, None] + channel_offsets[None, :],
        total.to(result_pointer.dtype.element_ty),
        mask=(pixel < pixels)[:, None] & (out_channel < GROUP_OUT)[None, :],
    )


@triton.jit
def conv2d_weight_grad(
    grad_pointer,
    x_pointer,
    partial_pointer,
    images,
    x_height,
    x_width,
    height,
    width,
    pixels_per_split,
    partial_stride,
    grad_stride_n,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    weight_stride_out,
    weight_stride_in,
    weight_stride_h,
    weight_stride_w,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_TOP: tl.constexpr,
    PADDING_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
):
    """One tile of one partial sum of dweight: BLOCK_M output channels by BLOCK_N (tap, channel).

    Program axis 0 counts tiles and groups, axis 1 the splits of the pixels; split i writes
    partial i, laid out as the weight.
    """
    program = tl.program_id(0)
    split = tl.program_id(1)
    if INT64:
        program = program.to(tl.int64)
        split = split.to(tl.int64)
    products: tl.constexpr = KERNEL_H * KERNEL_W * GROUP_IN
    tiles_n: tl.constexpr = (products + BLOCK_N - 1) // BLOCK_N
    tiles_m: tl.constexpr = (GROUP_OUT + BLOCK_M - 1) // BLOCK_M
    group = program // (tiles_n * tiles_m)
    out_channel = program // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    product = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = product % GROUP_IN
    tap_row = product // GROUP_IN // KERNEL_W
    tap_column = product // GROUP_IN % KERNEL_W

    grad_channel_offsets = (group * GROUP_OUT + out_channel) * grad_stride_c
    x_channel_offsets = (group * GROUP_IN + channel) * x_stride_c
    first = split * pixels_per_split
    end = tl.minimum(first + pixels_per_split, images * height * width)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)
        image, row, column = _split_pixel(pixel, height, width)
        grad = tl.load(
            grad_pointer
            + (image * grad_stride_n + row * grad_stride_h + column * grad_stride_w)[:, None]
            + grad_channel_offsets[None, :],
            mask=(pixel < end)[:, None] & (out_channel < GROUP_OUT)[None, :],
            other=0.0,
        )
        from_row = (row * STRIDE_H - PADDING_TOP)[:, None] + (tap_row * DILATION_H)[None, :]
        from_column = (column * STRIDE_W - PADDING_LEFT)[:, None] + (tap_column * DILATION_W)[
            None, :
        ]
        inside = (from_row >= 0) & (from_row < x_height)
        inside = inside & (from_column >= 0) & (from_column < x_width)
        inside = inside & (pixel < end)[:, None] & (product < products)[None, :]
        x = tl.load(
            x_pointer
            + (image * x_stride_n)[:, None]
            + from_row * x_stride_h
            + from_column * x_stride_w
            + x_channel_offsets[None, :],
            mask=inside,
            other=0.0,
        )
        total = _dot(tl.trans(grad), x, total, PRECISION, UPCAST)

    weight_offsets = (
        channel * weight_stride_in + tap_row * weight_stride_h + tap_column * weight_stride_w
    )
    tl.store(
        partial_pointer
        + split * partial_stride
        + ((group * GROUP_OUT + out_channel) * weight_stride_out)[:, None]
        + weight_offsets[None, :],
        total.to(partial_pointer.dtype.element_ty),
        mask=(out_channel < GROUP_OUT)[:, None] & (product < products)[None, :],
    )


@triton.jit
def conv2d_epilogue_backward(
    grad_pointer,
    y_pointer,
    masked_pointer,
    partial_pointer,
    pixels,
    image_pixels,
    pixels_per_split,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT64: tl.constexpr,
):
    """With RELU writes h, with BIAS one partial sum of dbias; g and y are read once.

    Program axis 0 counts blocks of channels, axis 1 splits of the pixels. g, y and h share
    one dense layout.
    """
    split = tl.program_id(1)
    if INT64:
        split = split.to(tl.int64)
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * pixels_per_split
    end = tl.minimum(first + pixels_per_split, pixels)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        if CHANNELS_LAST:
            offsets = pixel[:, None] * CHANNELS + channel[None, :]
        else:
            plane = (pixel // image_pixels)[:, None] * CHANNELS + channel[None, :]
            offsets = plane * image_pixels + (pixel % image_pixels)[:, None]
        mask = (pixel < end)[:, None] & (channel < CHANNELS)[None, :]
        grad = tl.load(grad_pointer + offsets, mask=mask, other=0.0)
        if RELU:
            y = tl.load(y_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(y <= 0.0, 0.0, grad.to(tl.float32)).to(grad.dtype)
            tl.store(masked_pointer + offsets, grad, mask=mask)
        total += grad.to(tl.float32)
    if BIAS:
        partial = tl.sum(total, axis=0)
        tl.store(partial_pointer + split * CHANNELS + channel, partial, mask=channel < CHANNELS)


@triton.jit
def sum_partials(
    partial_pointer,
    sum_pointer,
    count,
    splits,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """sum[i] = partial[0, i] + partial[1, i] + ..., in this order."""
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    total = tl.zeros((BLOCK,), tl.float32)
    source = offsets
    for _ in range(splits):
        total += tl.load(partial_pointer + source, mask=mask, other=0.0)
        source += count
    tl.store(sum_pointer + offsets, total.to(sum_pointer.dtype.element_ty), mask=mask)
