"""Stored images to normalised crops: crop, mirror, mean, shift, scale, cast, pad, pack, layout.

For value (row r, column w, channel c) of image b's crop, whose corner is (top, left):

    pixel = images[b, top + r, left + w, c],   w counted from the right if flips[b]
    y[b, c, r, w] = ((pixel - mean[r, w, c]) + shift[b, c]) * scale

in float32, in this order, rounded to the result's dtype once. Nothing in it can be contracted to
a fused multiply-add, so the bits are those of plain PyTorch. Corners are clamped, so that a crop
never leaves its image. The result is F.pixel_unshuffle(F.pad(y, padding), SIDE): blocks of
SIDE x SIDE pixels are one, of DEPTH = 3 * SIDE**2 values,

    result[b, (c * SIDE + i) * SIDE + j, R, Q] =
        y[b, c, R * SIDE + i - padding_top, Q * SIDE + j - padding_left],   0 outside of the crop

Layout: it is written as [row, column, depth] (channels_last). Byte j = 3 * w + c of a crop's row
is that of consecutive bytes of the image; mirrored, it is byte 3 * (crop_width - 1) - j + 2 * c,
as pixels change places and their channels do not.

A program owns BLOCK * VECTOR consecutive values of the result, in images_per_program images: the
mean, and where the values lie, are found once for all of them (read again for every image, the
float32 mean alone would be more traffic than the rest). Each image's bytes are read once and each
value is written once, VECTOR neighbours together. VECTOR divides the row if SIDE is 1, and else
DEPTH; being a power of two it divides SIDE**2 as well, so that a vector is of one channel.
"""

import triton
import triton.language as tl


@triton.jit
def augment_crops(
    images_pointer,
    corners_pointer,
    flips_pointer,
    mean_pointer,
    shift_pointer,
    result_pointer,
    batch,
    height,
    width,
    crop_height,
    crop_width,
    result_height,
    result_width,
    padding_top,
    padding_left,
    images_per_program,
    scale,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes a part of the results of some images; shift is read with SHIFT only."""
    DEPTH: tl.constexpr = 3 * SIDE * SIDE
    row_vectors = DEPTH * result_width // VECTOR
    vectors = result_height * row_vectors
    parts = tl.cdiv(vectors, BLOCK)
    vector = (tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK))[:, None]
    lane = tl.arange(0, VECTOR)[None, :]
    mask = vector < vectors
    # beyond the result its last vector is made again, which costs less than masks on single bytes
    vector = tl.minimum(vector, vectors - 1)
    # the depth of a vector's first value, which by an unsigned modulo is known not to be negative
    first = (vector.to(tl.uint32) * VECTOR % DEPTH).to(tl.int32)
    depth = (first + lane) % 3 if SIDE == 1 else first + lane
    channel = depth // (SIDE * SIDE)
    value = vector % row_vectors * VECTOR + lane
    row = vector // row_vectors * SIDE + depth // SIDE % SIDE
    byte = (value - depth) // SIDE + depth % SIDE * 3 + channel  # value if SIDE is 1
    if PADDED:
        row -= padding_top
        byte -= 3 * padding_left
        inside = (row >= 0) & (row < crop_height) & (byte >= 0) & (byte < 3 * crop_width)
    straight = row * (3 * width) + byte
    mirrored = row * (3 * width) + 3 * (crop_width - 1) - byte + 2 * channel
    place = row * (3 * crop_width) + byte
    if PADDED:  # the crop's first value is always there to be read
        straight = tl.where(inside, straight, 0)
        mirrored = tl.where(inside, mirrored, 0)
        place = tl.where(inside, place, 0)
    elif SIDE == 1:
        place = vector * VECTOR + lane  # the same, but seen to be neighbours
    mean = tl.load(mean_pointer + place)
    start = tl.program_id(0) // parts * images_per_program
    for image in range(start, tl.minimum(start + images_per_program, batch)):
        top = _corner(corners_pointer + 2 * image, height - crop_height)
        left = _corner(corners_pointer + 2 * image + 1, width - crop_width)
        flip = tl.load(flips_pointer + image) != 0
        if INT64:
            image = tl.cast(image, tl.int64)
        crop_pointer = images_pointer + ((image * height + top) * width + left) * 3
        pixel = tl.load(crop_pointer + tl.where(flip, mirrored, straight))
        y = pixel.to(tl.float32) - mean
        if SHIFT:
            y += _per_channel(shift_pointer + 3 * image, first, lane, SIDE)
        y *= tl.cast(scale, tl.float32)
        if PADDED:
            y = tl.where(inside, y, 0.0)
        target = (image * vectors + vector) * VECTOR + lane
        tl.store(result_pointer + target, y.to(result_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _corner(pointer, largest):
    """One coordinate of a corner, clamped to [0, largest]."""
    return tl.minimum(tl.maximum(tl.load(pointer), 0), largest).to(tl.int32)


@triton.jit
def _per_channel(pointer, first, lane, SIDE: tl.constexpr):
    """Three numbers by channel: chosen per vector first, as a lane is known when compiling."""
    red = tl.load(pointer)
    green = tl.load(pointer + 1)
    blue = tl.load(pointer + 2)
    channel = first // (SIDE * SIDE)
    chosen = _choose(channel, red, green, blue)
    if SIDE == 1:  # elsewhere a vector's values are of one channel
        second = _choose(channel, green, blue, red)
        third = _choose(channel, blue, red, green)
        chosen = _choose(lane % 3, chosen, second, third)
    return chosen


@triton.jit
def _choose(number, if_0, if_1, if_2):
    return tl.where(number == 0, if_0, tl.where(number == 1, if_1, if_2))
