"""Dropout by counter-based random bits: no mask is stored.

Element i (global row-major index) uses word i % 4 of Philox4x32-10(counter=i // 4, key=seed):

    y[i] = x[i] * (scale if word[i] >= threshold else 0),   threshold = round(p * 2**32)

Backward applies the same kernel with the same seed to the gradient. A product, not a selection:
a dropped NaN or infinity gives NaN, as in PyTorch. The seed is read from device memory, so that
a captured CUDA graph draws new masks whenever the seed tensor is refilled.

i is a property of the element, not of its place in memory: a dense tensor is [rows, channels,
inner], stored in that order or as [rows, inner, channels] (CHANNELS_LAST), and

    i = index_offset + row * row_stride + channel * inner + position

A program owns BLOCK consecutive elements in memory. ALIGNED says that i = index_offset + place
with index_offset a multiple of 4: then Philox runs once for every four neighbours, otherwise
once per element.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(counter, seed):
    """Four uint32 words of Philox4x32-10 per 64-bit counter."""
    counter = counter.to(tl.int64)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def _words_of_counters(counter, seed):
    """The words of each counter in the order 0 1 2 3, as two more dimensions of 2."""
    word0, word1, word2, word3 = _philox(counter, seed)
    # join adds the fastest index
    return tl.join(tl.join(word0, word2), tl.join(word1, word3))


@triton.jit
def _words_of_places(
    place, seed, columns, inner, index_offset, row_stride, CHANNELS_LAST: tl.constexpr
):
    """The word of the element at each place (64 bits) of a dense tensor's memory."""
    column = place % columns
    if CHANNELS_LAST:
        channels = columns // inner
        column = column % channels * inner + column // channels
    index = index_offset + place // columns * row_stride + column
    word0, word1, word2, word3 = _philox(index // 4, seed)
    lane = index % 4
    lower = tl.where(lane == 0, word0, word1)
    upper = tl.where(lane == 2, word2, word3)
    return tl.where(lane < 2, lower, upper)


@triton.jit
def _keeps(
    program,
    offsets,
    seed_pointer,
    columns,
    inner,
    index_offset,
    row_stride,
    threshold,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whether each of a program's elements, which lie at the offsets, is kept."""
    seed = tl.load(seed_pointer)
    if ALIGNED:
        counter = program.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        words = _words_of_counters(counter + index_offset // 4, seed)
        word = tl.reshape(words, (BLOCK,))
    else:
        place = offsets.to(tl.int64)
        word = _words_of_places(
            place, seed, columns, inner, index_offset, row_stride, CHANNELS_LAST
        )
    return word.to(tl.int64) >= threshold  # threshold is 2**32 where p rounds to 1


@triton.jit
def dropout_apply(
    x_pointer,
    y_pointer,
    seed_pointer,
    count,
    columns,
    inner,
    index_offset,
    row_stride,
    threshold,
    scale,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Forward and backward: x and y are read and written once. columns = channels * inner."""
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    keep = _keeps(
        program,
        offsets,
        seed_pointer,
        columns,
        inner,
        index_offset,
        row_stride,
        threshold,
        CHANNELS_LAST,
        ALIGNED,
        BLOCK,
    )
    # VECTOR divides count: so written, VECTOR neighbours share their mask visibly
    mask = offsets // VECTOR < count // VECTOR
    x = tl.load(x_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.where(keep, tl.cast(scale, tl.float32), 0.0)
    tl.store(y_pointer + offsets, y.to(y_pointer.dtype.element_ty), mask=mask)
