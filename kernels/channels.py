"""Eight neighbouring channels per thread, and the sums over windows of channels.

A dense tensor is [outer, channels, inner] in memory: NCHW has inner = H * W, channels_last has
inner = 1. Its channels are cut into groups of GROUP_SIZE, and those into chunks of eight. A row is
one chunk of one position; a program owns ROWS rows, a thread one or more whole rows, so that a sum
over channels stays in its registers.

A window tensor is a row's eight channels and HALO more on either side, zero beyond the group's
borders. It is held as a tuple of parts:

    PACKED (channels_last, 8 divides GROUP_SIZE): [ROWS, HALO], [ROWS, 8], [ROWS, HALO], of which
        the middle one is a 16-byte access in half precision;
    else: one [ROWS] part per channel; neighbouring rows are neighbouring positions in NCHW.

Arithmetic on single values works on the parts as they are; columns() gives one [ROWS] tensor per
channel, either way.
"""

import triton
import triton.language as tl


@triton.jit
def locate(row, inner, GROUP_SIZE: tl.constexpr, PACKED: tl.constexpr):
    """The offset of each row's first channel, and the number of its chunk in the group."""
    chunks: tl.constexpr = (GROUP_SIZE + 7) // 8
    if PACKED:
        return row * 8, row % chunks
    chunk = row // inner % chunks
    group = row // inner // chunks
    return (group * GROUP_SIZE + chunk * 8) * inner + row % inner, chunk


@triton.jit
def load_window(
    pointer,
    base,
    chunk,
    mask,
    inner,
    GROUP_SIZE: tl.constexpr,
    HALO: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The parts of a window tensor; HALO is a power of two up to 8 if PACKED."""
    if PACKED:
        halo = tl.arange(0, HALO)[None, :]
        start = base[:, None]
        first = (mask & (chunk > 0))[:, None]
        last = (mask & (chunk < GROUP_SIZE // 8 - 1))[:, None]
        parts = (
            tl.load(pointer + start - HALO + halo, mask=first, other=0),
            tl.load(pointer + start + tl.arange(0, 8)[None, :], mask=mask[:, None], other=0),
            tl.load(pointer + start + 8 + halo, mask=last, other=0),
        )
    else:
        parts = ()
        inner = tl.cast(inner, base.dtype)
        for channel in tl.static_range(-HALO, 8 + HALO):
            place = chunk * 8 + channel
            inside = mask & (place >= 0) & (place < GROUP_SIZE)
            value = tl.load(pointer + base + channel * inner, mask=inside, other=0)
            parts = parts + (value,)
    return parts


@triton.jit
def columns(parts, PACKED: tl.constexpr):
    """A window tensor as float32 [ROWS] tensors, one per channel."""
    values = split(parts[0]) + split(parts[1]) + split(parts[2]) if PACKED else parts
    result = ()
    for i in tl.static_range(len(values)):
        result = result + (values[i].to(tl.float32),)
    return result


@triton.jit
def split(tile):
    """The columns of a [ROWS, n] tile, each in registers of its own; n is 1, 2, 4 or 8."""
    rows: tl.constexpr = tile.shape[0]
    width: tl.constexpr = tile.shape[1]
    parts = (tile,)
    for _ in tl.static_range(3):  # parts[i] holds the columns j with j % len(parts) == i
        if len(parts) < width:
            even = ()
            odd = ()
            for i in tl.static_range(len(parts)):
                first, second = tl.split(parts[i].reshape(rows, width // len(parts) // 2, 2))
                even = even + (first,)
                odd = odd + (second,)
            parts = even + odd
    result = ()
    for i in tl.static_range(width):
        result = result + (parts[i].reshape(rows),)
    return result


@triton.jit
def join(values):
    """The [ROWS, 8] tile of eight columns."""
    rows: tl.constexpr = values[0].shape[0]
    parts = values
    for _ in tl.static_range(3):  # the inverse of split
        half = ()
        for i in tl.static_range(len(parts) // 2):
            pair = tl.join(parts[i], parts[i + len(parts) // 2])
            half = half + (pair.reshape(rows, 16 // len(parts)),)
        parts = half
    return parts[0]


@triton.jit
def window_sums(values, SIZE: tl.constexpr):
    """Sums of each SIZE neighbouring columns; pairs that start at an even column are shared."""
    pairs = ()
    for i in tl.static_range(len(values) // 2):
        pairs = pairs + (values[2 * i] + values[2 * i + 1],)
    sums = ()
    for start in tl.static_range(len(values) - SIZE + 1):
        total = 0.0
        for i in tl.static_range(start, start + SIZE):
            if i % 2 == 0 and i + 1 < start + SIZE:
                total += pairs[i // 2]
            elif i % 2 == 0 or i == start:
                total += values[i]
        sums = sums + (total,)
    return sums


@triton.jit
def store(pointer, base, chunk, mask, inner, tile, GROUP_SIZE: tl.constexpr, PACKED: tl.constexpr):
    """Write a row's eight channels from a [ROWS, 8] tile, those inside the group."""
    tile = tile.to(pointer.dtype.element_ty)
    if PACKED:
        tl.store(pointer + base[:, None] + tl.arange(0, 8)[None, :], tile, mask=mask[:, None])
    else:
        values = split(tile)
        inner = tl.cast(inner, base.dtype)
        for channel in tl.static_range(8):
            inside = mask & (chunk * 8 + channel < GROUP_SIZE)
            tl.store(pointer + base + channel * inner, values[channel], mask=inside)
