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

`conv2d` computes y and dx alike. The pixels i of dx that leave the same rest when divided by the
stride are reached by the same taps, and on these dx is a convolution of h with stride 1, whose
taps step backwards (a negative DILATION); ops/conv_passes.py launches it once per rest, on views
of dx and weight. So no product with an inserted zero is ever made.

Nothing is unfolded in memory: rows of the left matrix are pixels, its columns are (tap, channel),
addressed on the fly. All strides are arguments, so NCHW and channels_last need no copy. Sums are
in float32; long sums over pixels are split into partial sums that `sum_partials` adds in a fixed
order, without atomics.

A few channels, as of a colour image, make no 16-byte loads and no tensor core busy. With a stride
s they become s * s times as many, of a smaller image (F.pixel_unshuffle), and the kernel s times
smaller with stride 1: `space_to_depth` writes that image, its padding included.
"""

import triton
import triton.language as tl


@triton.jit
def _split_pixel(pixel, height, width):
    """Image, row and column of a pixel's number in [images, height, width]."""
    return pixel // (height * width), (pixel // width) % height, pixel % width


@triton.jit
def _within(position, extent):
    """Whether 0 <= position < extent, in one comparison: below 0 is beyond any extent."""
    if position.dtype == tl.int64:
        return position.to(tl.uint64) < extent
    return position.to(tl.uint32) < tl.cast(extent, tl.uint32)


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Add left @ right to total, in float32."""
    if UPCAST:  # Triton's interpreter multiplies the raw bits of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _bias(bias_pointer, group, out_channel, GROUP_OUT: tl.constexpr):
    """Of a group's channels, as a row."""
    mask = out_channel < GROUP_OUT
    bias = tl.load(bias_pointer + group * GROUP_OUT + out_channel, mask=mask, other=0.0)
    return bias.to(tl.float32)[None, :]


@triton.jit
def _reaching(position, extent, count, STEP: tl.constexpr):
    """The steps t of count for which 0 <= position + t * STEP < extent: the first, and the end."""
    if STEP > 0:
        first = (STEP - 1 - position) // STEP
        end = (STEP - 1 + extent - position) // STEP
    else:
        first = (position - extent - STEP) // -STEP
        end = (position - STEP) // -STEP
    # where a numerator is negative, the quotient is 0 or less, rounded either way
    first = tl.maximum(first, 0)
    return first, tl.maximum(tl.minimum(end, count), first)


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
    padding_top,
    padding_left,
    source_stride_n,
    source_stride_c,
    source_stride_h,
    source_stride_w,
    weight_stride_group,
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
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
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

    Tap t of result pixel o lies at o * STRIDE - padding + t * DILATION of the source, maybe
    outside if PADDED. The names are those of a forward: for dx, the source is h, and GROUP_IN are
    the channels of h.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
        images = tl.cast(images, tl.int64)
    pixels = images * height * width
    tiles_n: tl.constexpr = (GROUP_OUT + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    group = program // (tiles_n * tiles_m)
    pixel = (program // tiles_n) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    out_channel = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    image, row, column = _split_pixel(pixel, height, width)
    row_origin = (row * STRIDE_H - padding_top)[:, None]
    column_origin = (column * STRIDE_W - padding_left)[:, None]
    source_pointer += group * GROUP_IN * source_stride_c
    weight_pointer += group * weight_stride_group
    image_offset = (image * source_stride_n)[:, None]
    out_channel_offset = (out_channel * weight_stride_out)[None, :]

    products: tl.constexpr = KERNEL_H * KERNEL_W * GROUP_IN
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, products, BLOCK_K):
        product = start + tl.arange(0, BLOCK_K)
        channel = (product % GROUP_IN).to(pixel.dtype)  # 64 bits if offsets need them
        tap = product[None, :] // GROUP_IN
        if GROUP_IN % BLOCK_K == 0:
            tap = start // GROUP_IN  # one for all: positions are computed once per pixel
        tap_row = tap // KERNEL_W
        tap_column = tap % KERNEL_W
        from_row = row_origin + tap_row * DILATION_H
        from_column = column_origin + tap_column * DILATION_W
        inside = (pixel < pixels)[:, None]
        if PADDED:
            inside = inside & _within(from_row, source_height) & _within(from_column, source_width)
        if products % BLOCK_K != 0:
            inside = inside & (product < products)[None, :]
        offsets = image_offset + from_row * source_stride_h + from_column * source_stride_w
        left = tl.load(
            source_pointer + (offsets + (channel * source_stride_c)[None, :]),
            mask=inside,
            other=0.0,
        )
        tap = product // GROUP_IN
        offsets = tap // KERNEL_W * weight_stride_h + tap % KERNEL_W * weight_stride_w
        offsets += channel * weight_stride_in
        inside = (out_channel < GROUP_OUT)[None, :]
        if products % BLOCK_K != 0:
            inside = inside & (product < products)[:, None]
        right = tl.load(
            weight_pointer + (offsets[:, None] + out_channel_offset), mask=inside, other=0.0
        )
        total = _dot(left, right, total, PRECISION, UPCAST)

    if HAS_BIAS:
        total += _bias(bias_pointer, group, out_channel, GROUP_OUT)
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
def conv2d_boxes(
    source,
    weight,
    bias_pointer,
    result_pointer,
    images,
    source_height,
    source_width,
    height,
    width,
    padding_top,
    padding_left,
    result_stride_n,
    result_stride_c,
    result_stride_h,
    result_stride_w,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    IMAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
):
    """`conv2d` with stride 1 for many images: a tile is COLUMNS pixels of a row in IMAGES images.

    Its operands are boxes that tensor descriptors load, zeros where they leave the image: taps
    that lie outside for all of a tile are left out, and no position is computed per element.
    The source is [images, height, width, channels], BLOCK_K divides GROUP_IN. The weight is
    [GROUP_OUT, (tap, GROUP_IN)] of each group, TURNED [GROUP_IN, (tap, GROUP_OUT)].
    """
    program = tl.program_id(0)
    tiles_n: tl.constexpr = (GROUP_OUT + BLOCK_N - 1) // BLOCK_N
    tiles_w = tl.cdiv(width, COLUMNS)
    groups = tl.num_programs(0) // (tiles_n * tl.cdiv(images, IMAGES) * height * tiles_w)
    first_channel = program % tiles_n * BLOCK_N
    group = program // tiles_n % groups
    place = program // (tiles_n * groups)
    left = place % tiles_w * COLUMNS
    row = place // tiles_w % height
    first_image = place // (tiles_w * height) * IMAGES

    top_tap = row - padding_top
    left_tap = left - padding_left
    row_begin, row_end = _reaching(top_tap, source_height, KERNEL_H, DILATION_H)
    wider: tl.constexpr = COLUMNS - 1  # some column of the tile reaches the source
    column_begin, column_end = _reaching(
        left_tap + wider, source_width + wider, KERNEL_W, DILATION_W
    )
    taps = (row_end - row_begin) * (column_end - column_begin)
    blocks: tl.constexpr = GROUP_IN // BLOCK_K
    total = tl.zeros((IMAGES * COLUMNS, BLOCK_N), tl.float32)
    for step in range(0, taps * blocks):
        tap_row = row_begin + step // blocks // (column_end - column_begin)
        tap_column = column_begin + step // blocks % (column_end - column_begin)
        channel = step % blocks * BLOCK_K
        pixels = source.load(
            [
                first_image,
                top_tap + tap_row * DILATION_H,
                left_tap + tap_column * DILATION_W,
                group * GROUP_IN + channel,
            ]
        ).reshape(IMAGES * COLUMNS, BLOCK_K)
        tap = tap_row * KERNEL_W + tap_column
        if TURNED:
            right = weight.load([group * GROUP_IN + channel, tap * GROUP_OUT + first_channel])
        else:
            right = weight.load([group * GROUP_OUT + first_channel, tap * GROUP_IN + channel]).T
        total = _dot(pixels, right, total, PRECISION, UPCAST)

    out_channel = first_channel + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        total += _bias(bias_pointer, group, out_channel, GROUP_OUT)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)  # keeps NaN, unlike maximum
    image = first_image + tl.arange(0, IMAGES * COLUMNS) // COLUMNS
    column = left + tl.arange(0, IMAGES * COLUMNS) % COLUMNS
    if INT64:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    pixel_offsets = image * result_stride_n + row * result_stride_h + column * result_stride_w
    channel_offsets = (group * GROUP_OUT + out_channel) * result_stride_c
    tl.store(
        result_pointer + pixel_offsets[:, None] + channel_offsets[None, :],
        total.to(result_pointer.dtype.element_ty),
        mask=((image < images) & (column < width))[:, None] & (out_channel < GROUP_OUT)[None, :],
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
    padding_top,
    padding_left,
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
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
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
        images = tl.cast(images, tl.int64)
    products: tl.constexpr = KERNEL_H * KERNEL_W * GROUP_IN
    tiles_n: tl.constexpr = (products + BLOCK_N - 1) // BLOCK_N
    tiles_m: tl.constexpr = (GROUP_OUT + BLOCK_M - 1) // BLOCK_M
    group = program // (tiles_n * tiles_m)
    out_channel = program // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    product = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = product % GROUP_IN
    tap_row = product // GROUP_IN // KERNEL_W
    tap_column = product // GROUP_IN % KERNEL_W
    row_origin = (tap_row * DILATION_H - padding_top)[None, :]
    column_origin = (tap_column * DILATION_W - padding_left)[None, :]

    grad_channel_offsets = ((group * GROUP_OUT + out_channel) * grad_stride_c)[None, :]
    x_channel_offsets = ((group * GROUP_IN + channel) * x_stride_c)[None, :]
    first = split * pixels_per_split
    end = tl.minimum(first + pixels_per_split, images * height * width)
    # A block's pixels advance by so many images, rows and columns: no division in the loop.
    image_step, row_step, column_step = _split_pixel(BLOCK_K, height, width)
    lane = tl.arange(0, BLOCK_K)
    image, row, column = _split_pixel(first + lane, height, width)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        inside = (start + lane < end)[:, None]
        offsets = image * grad_stride_n + row * grad_stride_h + column * grad_stride_w
        grad = tl.load(
            grad_pointer + (offsets[:, None] + grad_channel_offsets),
            mask=inside & (out_channel < GROUP_OUT)[None, :],
            other=0.0,
        )
        from_row = (row * STRIDE_H)[:, None] + row_origin
        from_column = (column * STRIDE_W)[:, None] + column_origin
        if PADDED:
            inside = inside & _within(from_row, x_height) & _within(from_column, x_width)
        if products % BLOCK_N != 0:
            inside = inside & (product < products)[None, :]
        offsets = (image * x_stride_n)[:, None] + from_row * x_stride_h + from_column * x_stride_w
        x = tl.load(x_pointer + (offsets + x_channel_offsets), mask=inside, other=0.0)
        total = _dot(tl.trans(grad), x, total, PRECISION, UPCAST)
        column += column_step
        carry = column >= width
        column = tl.where(carry, column - width, column)
        row += row_step + carry.to(tl.int32)
        carry = row >= height
        row = tl.where(carry, row - height, row)
        image += image_step + carry.to(tl.int32)

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
def conv2d_weight_grad_boxes(
    grad,
    x,
    partial_pointer,
    images,
    x_height,
    x_width,
    height,
    width,
    padding_top,
    padding_left,
    partial_stride,
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
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
):
    """`conv2d_weight_grad` for many images: sums over one output pixel of BLOCK_K images at a time.

    A tile is BLOCK_M output channels by BLOCK_N input channels of one tap. Both operands are boxes
    of [images, height, width, channels], and pixels whose tap lies outside are left out.
    """
    program = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n: tl.constexpr = (GROUP_IN + BLOCK_N - 1) // BLOCK_N
    tiles_m: tl.constexpr = (GROUP_OUT + BLOCK_M - 1) // BLOCK_M
    first_in = program % tiles_n * BLOCK_N
    tap = program // tiles_n % (KERNEL_H * KERNEL_W)
    program //= tiles_n * KERNEL_H * KERNEL_W
    first_out = program % tiles_m * BLOCK_M
    group = program // tiles_m

    top = tap // KERNEL_W * DILATION_H - padding_top
    left = tap % KERNEL_W * DILATION_W - padding_left
    row_begin, row_end = _reaching(top, x_height, height, STRIDE_H)
    column_begin, column_end = _reaching(left, x_width, width, STRIDE_W)
    columns = column_end - column_begin
    blocks = tl.cdiv(images, BLOCK_K)
    steps = (row_end - row_begin) * columns * blocks
    each = tl.cdiv(steps, tl.num_programs(1))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * each, tl.minimum(split * each + each, steps)):
        image = step % blocks * BLOCK_K
        row = row_begin + step // blocks // columns
        column = column_begin + step // blocks % columns
        grads = grad.load([image, row, column, group * GROUP_OUT + first_out])
        from_row = top + row * STRIDE_H
        from_column = left + column * STRIDE_W
        pixels = x.load([image, from_row, from_column, group * GROUP_IN + first_in])
        total = _dot(
            grads.reshape(BLOCK_K, BLOCK_M).T,
            pixels.reshape(BLOCK_K, BLOCK_N),
            total,
            PRECISION,
            UPCAST,
        )

    out_channel = first_out + tl.arange(0, BLOCK_M)
    channel = first_in + tl.arange(0, BLOCK_N)
    if INT64:
        split = split.to(tl.int64)
        out_channel = out_channel.to(tl.int64)
        channel = channel.to(tl.int64)
    base = split * partial_stride + tap // KERNEL_W * weight_stride_h
    base += tap % KERNEL_W * weight_stride_w
    tl.store(
        partial_pointer
        + base
        + ((group * GROUP_OUT + out_channel) * weight_stride_out)[:, None]
        + (channel * weight_stride_in)[None, :],
        total.to(partial_pointer.dtype.element_ty),
        mask=(out_channel < GROUP_OUT)[:, None] & (channel < GROUP_IN)[None, :],
    )


@triton.jit
def space_to_depth(
    x_pointer,
    result_pointer,
    count,
    channels,
    height,
    width,
    result_height,
    result_width,
    padding_top,
    padding_left,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Pixels of BLOCK_H x BLOCK_W as one pixel of DEPTH channels, in channels_last.

        result[n, (c * BLOCK_H + i) * BLOCK_W + j, r, q] =
            x[n, c, r * BLOCK_H + i - padding_top, q * BLOCK_W + j - padding_left]

    and 0 outside x, and for channels that it does not have. Each program writes BLOCK vectors of
    VECTOR channels.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    vector = (program * BLOCK + tl.arange(0, BLOCK))[:, None]
    lane = tl.arange(0, VECTOR)[None, :]
    vectors: tl.constexpr = DEPTH // VECTOR
    depth = vector % vectors * VECTOR + lane
    image, row, column = _split_pixel(vector // vectors, result_height, result_width)
    channel = depth // (BLOCK_H * BLOCK_W)
    from_row = row * BLOCK_H + depth // BLOCK_W % BLOCK_H - padding_top
    from_column = column * BLOCK_W + depth % BLOCK_W - padding_left
    mask = vector < count // VECTOR
    inside = mask & (channel < channels) & _within(from_row, height)
    offsets = image * x_stride_n + channel * x_stride_c
    offsets += from_row * x_stride_h + from_column * x_stride_w
    x = tl.load(x_pointer + offsets, mask=inside & _within(from_column, width), other=0.0)
    tl.store(result_pointer + (vector * VECTOR + lane), x, mask=mask)


@triton.jit
def conv2d_epilogue(
    y_pointer,
    bias_pointer,
    count,
    inner,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Replace a convolution that someone else computed by y in place, in [outer, CHANNELS, inner].

    VECTOR divides the extent that is innermost in memory.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    vector = (program * BLOCK + tl.arange(0, BLOCK))[:, None]
    offsets = vector * VECTOR + tl.arange(0, VECTOR)[None, :]
    mask = vector < count // VECTOR
    y = tl.load(y_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_pointer + offsets // inner % CHANNELS).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, unlike maximum
    tl.store(y_pointer + offsets, y.to(y_pointer.dtype.element_ty), mask=mask)


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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """sum[i] = partial[0, i] + partial[1, i] + ..., in an order that depends on ROWS alone.

    Threads take every ROWS-th partial sum, so that few numbers are not summed one by one.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS).to(offsets.dtype)[:, None]
    mask = (offsets < count)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, splits, ROWS):
        inside = mask & (start + row < splits)
        partial = partial_pointer + ((start + row) * count + offsets[None, :])
        total += tl.load(partial, mask=inside, other=0.0)
    result = tl.sum(total, axis=0).to(sum_pointer.dtype.element_ty)
    tl.store(sum_pointer + offsets, result, mask=offsets < count)
