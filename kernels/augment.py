"""Stored images to normalised crops: crop, mirror, mean, colour shift, scale, cast, layout.

For value (row r, column w, channel c) of image b's crop, whose corner is (top, left):

    pixel = images[b, top + r, left + w, c],   w counted from the right if flips[b]
    y[b, c, r, w] = ((pixel - mean[r, w, c]) + shift[b, c]) * scale

in float32, in this order, rounded to the result's dtype once. Nothing in it can be contracted to
a fused multiply-add, so the bits are those of plain PyTorch. Corners are clamped, so that a crop
never leaves its image.

Layout: a crop is written as [row, column, channel] (channels_last). Its row is 3 * crop_width
consecutive values, and consecutive bytes of the image; mirrored, value j of a row is byte
3 * (crop_width - 1) - j + 2 * (j % 3), as pixels change places and their channels do not.

A program owns BLOCK * VECTOR consecutive values of the crop, in images_per_program images: the
mean, and where the values lie, are found once for all of them (read again for every image, the
float32 mean alone would be more traffic than the rest). Each image's bytes are read once and each
value is written once, VECTOR neighbours together; VECTOR divides the row.
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
    images_per_program,
    scale,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes a part of the crops of some images; shift is read with SHIFT only."""
    row_vectors = 3 * crop_width // VECTOR
    crop_vectors = crop_height * row_vectors
    parts = tl.cdiv(crop_vectors, BLOCK)
    vector = (tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK))[:, None]
    lane = tl.arange(0, VECTOR)[None, :]
    mask = vector < crop_vectors
    # beyond the crop its last vector is read again, which costs less than masks on single bytes
    vector = tl.minimum(vector, crop_vectors - 1)
    mean = tl.load(mean_pointer + (vector * VECTOR + lane))
    first = vector * VECTOR % 3  # the channel of a vector's first value
    value = vector % row_vectors * VECTOR + lane
    row = vector // row_vectors * (3 * width)
    straight = row + value
    mirrored = row + 3 * (crop_width - 1) - value + 2 * ((first + lane) % 3)
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
            y += _per_channel(shift_pointer + 3 * image, first, lane)
        y *= tl.cast(scale, tl.float32)
        target = (image * crop_vectors + vector) * VECTOR + lane
        tl.store(result_pointer + target, y.to(result_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _corner(pointer, largest):
    """One coordinate of a corner, clamped to [0, largest]."""
    return tl.minimum(tl.maximum(tl.load(pointer), 0), largest).to(tl.int32)


@triton.jit
def _per_channel(pointer, first, lane):
    """Three numbers by channel: chosen per vector first, as a lane is known when compiling."""
    red = tl.load(pointer)
    green = tl.load(pointer + 1)
    blue = tl.load(pointer + 2)
    a = tl.where(first == 0, red, tl.where(first == 1, green, blue))
    b = tl.where(first == 0, green, tl.where(first == 1, blue, red))
    c = tl.where(first == 0, blue, tl.where(first == 1, red, green))
    return tl.where(lane % 3 == 0, a, tl.where(lane % 3 == 1, b, c))
