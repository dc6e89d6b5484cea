"""Local response normalisation across channels.

Forward, for channel c of one pixel (paper section 3.3; s = alpha or alpha / size):

    W(c) = [c - BEFORE, c + AFTER], cut at the borders of c's group of channels
           (BEFORE = size // 2, AFTER = (size - 1) // 2)
    d[c] = k + s * sum(x[j]**2 for j in W(c))
    y[c] = x[c] * d[c]**-beta

Backward, for the gradient g of y. x[c] enters its own numerator and d[j] of every window that
holds it, {j : c in W(j)} = [c - AFTER, c + BEFORE] (mirrored: it differs for even sizes):

    t[j]  = g[j] * x[j] * d[j]**(-beta - 1)
    dx[c] = g[c] * d[c]**-beta - 2 * s * beta * x[c] * sum(t[j] for j with c in W(j))

Only x is kept from forward; d is computed again.

Layout: any dense tensor is [outer, CHANNELS, inner] in memory. NCHW has inner = H * W,
channels_last has inner = 1, so one kernel serves both: the neighbour j channels away lies
j * inner elements away. A program owns BLOCK consecutive elements; forward reads x and
writes y once (neighbours come from the cache). Backward takes two passes, t then dx, because
every t[j] is used by all of its window.
"""

import triton
import triton.language as tl


@triton.jit
def _elements(count, BLOCK: tl.constexpr, VECTOR: tl.constexpr, INT64: tl.constexpr):
    """Offsets and mask of a program's elements.

    VECTOR divides count; dividing by it shows the compiler that VECTOR neighbours share their
    mask, which lets it use 16-byte accesses.
    """
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets // VECTOR < count // VECTOR


@triton.jit
def _window_sum(
    pointer,
    offsets,
    mask,
    inner,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """Sum of the values (or squares) from BEFORE channels before to AFTER channels after."""
    group_size: tl.constexpr = CHANNELS // GROUPS
    channel = (offsets // inner) % group_size  # CHANNELS is a multiple of group_size
    total = tl.zeros(offsets.shape, tl.float32)
    for shift in range(-BEFORE, AFTER + 1):
        inside = mask & (channel + shift >= 0) & (channel + shift < group_size)
        neighbour = offsets + shift * tl.cast(inner, offsets.dtype)
        value = tl.load(pointer + neighbour, mask=inside, other=0.0).to(tl.float32)
        total += value * value if SQUARE else value
    return total


@triton.jit
def _denominator(
    x_pointer,
    offsets,
    mask,
    inner,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """d[c] = k + s * sum(x[j]**2 for j in W(c))."""
    square_sum = _window_sum(x_pointer, offsets, mask, inner, CHANNELS, GROUPS, BEFORE, AFTER, True)
    return tl.cast(k, tl.float32) + tl.cast(scale, tl.float32) * square_sum


@triton.jit
def _negative_power(d, BETA: tl.constexpr):
    """d**-BETA. Multiples of 1/4 take roots, each good to about an ulp."""
    if BETA >= 0 and BETA <= 4 and BETA * 4 == BETA * 4 // 1:
        result = tl.full(d.shape, 1.0, tl.float32)
        for _ in tl.static_range(int(BETA)):
            result = result / d
        if BETA % 1 >= 0.5:
            result = result * tl.rsqrt(d)
        if BETA % 0.5 > 0:
            result = result * tl.sqrt(tl.rsqrt(d))
    else:
        result = tl.exp2(-BETA * tl.log2(d))
    return result


@triton.jit
def lrn_forward(
    x_pointer,
    y_pointer,
    count,
    inner,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes y; x and y are read and written once."""
    offsets, mask = _elements(count, BLOCK, VECTOR, INT64)
    d = _denominator(x_pointer, offsets, mask, inner, scale, k, CHANNELS, GROUPS, BEFORE, AFTER)
    x = tl.load(x_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * _negative_power(d, BETA)
    tl.store(y_pointer + offsets, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def lrn_backward_terms(
    grad_pointer,
    x_pointer,
    terms_pointer,
    count,
    inner,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """First backward pass: writes t[j] = g[j] * x[j] * d[j]**(-beta - 1) in float32."""
    offsets, mask = _elements(count, BLOCK, VECTOR, INT64)
    d = _denominator(x_pointer, offsets, mask, inner, scale, k, CHANNELS, GROUPS, BEFORE, AFTER)
    x = tl.load(x_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    term = grad * x * _negative_power(d, BETA) / d
    tl.store(terms_pointer + offsets, term, mask=mask)


@triton.jit
def lrn_backward(
    grad_pointer,
    x_pointer,
    terms_pointer,
    dx_pointer,
    count,
    inner,
    scale,
    k,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Second backward pass: writes dx from g, x and the windows' sums of t."""
    offsets, mask = _elements(count, BLOCK, VECTOR, INT64)
    d = _denominator(x_pointer, offsets, mask, inner, scale, k, CHANNELS, GROUPS, BEFORE, AFTER)
    term_sum = _window_sum(
        terms_pointer, offsets, mask, inner, CHANNELS, GROUPS, AFTER, BEFORE, False
    )
    x = tl.load(x_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    dx = grad * _negative_power(d, BETA) - 2.0 * BETA * tl.cast(scale, tl.float32) * x * term_sum
    tl.store(dx_pointer + offsets, dx.to(dx_pointer.dtype.element_ty), mask=mask)
