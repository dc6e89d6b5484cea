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

A thread owns eight neighbouring channels (see channels.py). Forward reads BEFORE and AFTER more
on its sides; backward g likewise and x twice as many, to compute its neighbours' t itself. They
come from the cache: memory sees x, y, g and dx once.
"""

import triton
import triton.language as tl

from .channels import columns, join, load_window, locate, store, window_sums


@triton.jit
def negative_power(d, BETA: tl.constexpr):
    """d**-BETA. Multiples of 1/4 take roots, each good to about an ulp."""
    if BETA >= 0 and BETA <= 4 and BETA * 4 == BETA * 4 // 1:
        root = tl.rsqrt(d)
        power = tl.full(d.shape, 1.0, tl.float32)
        for _ in tl.static_range(int(BETA)):
            power *= root * root
        if BETA % 1 >= 0.5:
            power *= root
        if BETA % 0.5 > 0:
            power *= tl.sqrt(root)
    else:
        power = tl.exp2(-BETA * tl.log2(d))
    return power


@triton.jit
def denominators(x, scale, k, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """The d of the columns of x but the first BEFORE and the last AFTER."""
    squares = ()
    for i in tl.static_range(len(x)):
        squares = squares + (x[i] * x[i],)
    sums = window_sums(squares, BEFORE + 1 + AFTER)
    result = ()
    for i in tl.static_range(len(sums)):
        result = result + (tl.cast(k, tl.float32) + tl.cast(scale, tl.float32) * sums[i],)
    return result


@triton.jit
def normalise(x, scale, k, BEFORE: tl.constexpr, AFTER: tl.constexpr, BETA: tl.constexpr):
    """The [ROWS, 8] tile of y from 8 + BEFORE + AFTER columns of x."""
    d = denominators(x, scale, k, BEFORE, AFTER)
    return join(x[BEFORE : BEFORE + 8]) * negative_power(join(d), BETA)


@triton.jit
def input_grad(x, grad, scale, k, BEFORE: tl.constexpr, AFTER: tl.constexpr, BETA: tl.constexpr):
    """The [ROWS, 8] tile of dx.

    From the columns of g from AFTER before to BEFORE after the eight, and those of x from
    BEFORE + AFTER before to as many after.
    """
    d = denominators(x, scale, k, BEFORE, AFTER)
    direct = ()
    terms = ()
    for i in tl.static_range(len(d)):
        root = tl.rsqrt(d[i])
        direct = direct + (grad[i] * negative_power(d[i], BETA),)
        terms = terms + (direct[i] * (x[BEFORE + i] * (root * root)),)
    sums = window_sums(terms, BEFORE + 1 + AFTER)
    factor = 2.0 * BETA * tl.cast(scale, tl.float32)
    centre = x[BEFORE + AFTER : BEFORE + AFTER + 8]
    return join(direct[AFTER : AFTER + 8]) - factor * join(centre) * join(sums)


@triton.jit
def _rows(BLOCK: tl.constexpr, INT64: tl.constexpr):
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    return program * (BLOCK // 8) + tl.arange(0, BLOCK // 8)


@triton.jit
def lrn_forward(
    x_pointer,
    y_pointer,
    rows,
    inner,
    scale,
    k,
    GROUP_SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes y."""
    row = _rows(BLOCK, INT64)
    mask = row < rows
    base, chunk = locate(row, inner, GROUP_SIZE, PACKED)
    HALO: tl.constexpr = triton.next_power_of_2(max(BEFORE, AFTER, 1))
    parts = load_window(x_pointer, base, chunk, mask, inner, GROUP_SIZE, HALO, PACKED)
    x = columns(parts, PACKED)[HALO - BEFORE : HALO + 8 + AFTER]
    y = normalise(x, scale, k, BEFORE, AFTER, BETA)
    store(y_pointer, base, chunk, mask, inner, y, GROUP_SIZE, PACKED)


@triton.jit
def lrn_backward(
    grad_pointer,
    x_pointer,
    dx_pointer,
    rows,
    inner,
    scale,
    k,
    GROUP_SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes dx."""
    row = _rows(BLOCK, INT64)
    mask = row < rows
    base, chunk = locate(row, inner, GROUP_SIZE, PACKED)
    REACH: tl.constexpr = BEFORE + AFTER
    HALO: tl.constexpr = triton.next_power_of_2(max(BEFORE, AFTER, 1))
    WIDE: tl.constexpr = triton.next_power_of_2(max(REACH, 1))
    parts = load_window(x_pointer, base, chunk, mask, inner, GROUP_SIZE, WIDE, PACKED)
    x = columns(parts, PACKED)[WIDE - REACH : WIDE + 8 + REACH]
    parts = load_window(grad_pointer, base, chunk, mask, inner, GROUP_SIZE, HALO, PACKED)
    grad = columns(parts, PACKED)[HALO - AFTER : HALO + 8 + BEFORE]
    dx = input_grad(x, grad, scale, k, BEFORE, AFTER, BETA)
    store(dx_pointer, base, chunk, mask, inner, dx, GROUP_SIZE, PACKED)
