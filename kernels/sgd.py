"""One step of the paper's rule (section 5) over any number of parameters.

    v <- momentum * v - lr * (weight_decay * w + g / grad_scale)
    w <- w + v

v and w are float32. A parameter in half precision is the rounded copy of a master weight w: 4 + 4
bytes of w and v are read and written, 2 of g read and 2 of the copy written, 20 per parameter,
each once. A parameter in float32 is w itself; then g has 4 bytes (20 again) or 2.

Parameters lie anywhere in memory, so programs find them through tables. A piece is a run of
elements of one parameter; its row in ``pieces`` holds the addresses of its master weights,
velocities and parameters, its number of elements and that of its first program. ``gradients``
holds the address of its gradients, apart because these move from step to step. A program owns
BLOCK neighbours of the piece that ``owners`` names.

VECTOR divides the count of every piece, and VECTOR elements are the alignment of every address:
float32 is read and written in 16 bytes at VECTOR = 4, and the 8 bytes that a thread then has of a
half-precision tensor need no exchange between threads.
"""

import triton
import triton.language as tl


@triton.jit
def _elements(address, begin, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to the element ``begin`` behind the address that is stored at ``address``."""
    pointer = tl.load(address).to(tl.pointer_type(DTYPE)) + begin
    return tl.multiple_of(pointer, VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def sgd_step(
    pieces_pointer,
    gradients_pointer,
    owners_pointer,
    parameter_like,
    gradient_like,
    found_inf_pointer,
    grad_scale_pointer,
    lr,
    momentum,
    weight_decay,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    INT64: tl.constexpr,
):
    """Of parameter_like and gradient_like only the dtypes matter; begins are 64 bits always.

    GATED: nothing is touched unless found_inf is 0. LR_ON_DEVICE: lr is a pointer.
    """
    if GATED and tl.load(found_inf_pointer) != 0:
        return
    program = tl.program_id(0)
    owner = tl.load(owners_pointer + program)
    piece = pieces_pointer + owner * 5
    count = tl.load(piece + 3)
    begin = (program - tl.load(piece + 4)) * BLOCK
    parameter_type: tl.constexpr = parameter_like.dtype.element_ty
    gradient_type: tl.constexpr = gradient_like.dtype.element_ty
    w_pointer = _elements(piece, begin, tl.float32, VECTOR)
    v_pointer = _elements(piece + 1, begin, tl.float32, VECTOR)
    copy_pointer = _elements(piece + 2, begin, parameter_type, VECTOR)
    g_pointer = _elements(gradients_pointer + owner, begin, gradient_type, VECTOR)

    lane = tl.arange(0, BLOCK)
    left = tl.minimum(count - begin, BLOCK).to(tl.int32)
    mask = lane // VECTOR < left // VECTOR
    w = tl.load(w_pointer + lane, mask=mask)
    v = tl.load(v_pointer + lane, mask=mask)
    g = tl.load(g_pointer + lane, mask=mask).to(tl.float32)
    if SCALED:
        g *= 1.0 / tl.load(grad_scale_pointer).to(tl.float32)
    if LR_ON_DEVICE:
        lr = tl.load(lr)
    change = tl.cast(lr, tl.float32) * (tl.cast(weight_decay, tl.float32) * w + g)
    v = tl.cast(momentum, tl.float32) * v - change
    w += v
    tl.store(v_pointer + lane, v, mask=mask)
    tl.store(w_pointer + lane, w, mask=mask)
    if parameter_type != tl.float32:
        tl.store(copy_pointer + lane, w.to(parameter_type), mask=mask)
