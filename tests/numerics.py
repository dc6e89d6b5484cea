"""The rule by which results are compared, and each op's floor of error.

The truth is float64, computed by PyTorch on the same (already rounded) inputs. For the output and
for every gradient, in whatever dtype,

    max over elements of (error - floor) <= 2 * largest error of PyTorch's own op
    RMS error                            <= 2 * RMS error of PyTorch's own op + RMS floor

PyTorch's own op runs in the same dtype, on the same inputs and device. Where PyTorch lacks the
dtype there, its result is the truth rounded to the dtype. The floor is what no implementation with
float32 sums can avoid: half an ulp of the result's dtype (a whole one for bfloat16 in Triton's
interpreter, which cuts where hardware rounds), plus the error of its float32 arithmetic, derived
below per op in units of float32's unit roundoff u = 2**-24. There is no other tolerance.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexkern import ops, reference, use_backend
from alexkern.runtime.backend import current_backend
from alexkern.runtime.layout import dense, is_channels_last

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["nchw", "channels_last"]
UNIT = 2.0**-24  # unit roundoff of float32
UNIT_TF32 = 2.0**-11


def check(what: str, actual: Tensor, truth: Tensor, own_error: Tensor, floor: Tensor) -> None:
    """Apply the rule; ``floor`` is that of the float32 arithmetic alone."""
    assert actual.shape == truth.shape, what
    if truth.numel() == 0:
        return
    actual, truth, own_error = actual.detach(), truth.detach(), own_error.detach()
    kind = torch.finfo(actual.dtype)
    interpreted = actual.device.type == "cpu" and current_backend() == "triton"
    ulps = 1.0 if interpreted and actual.dtype == torch.bfloat16 else 0.5
    floor = floor.detach() + ulps * kind.eps * truth.abs().clamp_min(kind.smallest_normal)
    error = (actual.double() - truth).abs()
    largest = (error - floor).max()
    assert largest <= 2 * own_error.max(), f"{what}: {largest} above 2 * {own_error.max()}"
    limit = 2 * _rms(own_error) + _rms(floor)
    assert _rms(error) <= limit, f"{what}: RMS {_rms(error)} above {limit}"


def check_same(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and values, with equal signs of zero and NaN in the same places."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if actual.is_floating_point():
        numbers = ~expected.isnan()
        assert torch.equal(actual.signbit()[numbers], expected.signbit()[numbers])


def check_format(actual: Tensor, like: Tensor) -> None:
    """Dense in the memory format of ``like``, if that is dense itself."""
    if dense(like) is not like:
        return
    if like.dim() >= 3 and is_channels_last(like):
        assert actual.movedim(1, -1).is_contiguous()
    else:
        assert actual.is_contiguous()


def check_refusal(
    theirs: Callable[..., Any], ours: Callable[..., Any], named: str, *arguments: Any, **keys: Any
) -> None:
    """Both refuse the call with the same type of error, and ours names what is wrong."""
    with pytest.raises(Exception) as expected:  # noqa: PT011  (its type is the point)
        theirs(*arguments, **keys)
    for backend in ("triton", "torch"):
        with use_backend(backend), pytest.raises(expected.type) as raised:
            ours(*arguments, **keys)
        assert raised.type is expected.type
        assert named in str(raised.value)


def inside_nans(tensor: Tensor, offset: int) -> Tensor:
    """A copy with equal strides whose surroundings in memory are NaN, ``offset`` elements in."""
    margin = 4096
    buffer = tensor.new_full((tensor.numel() + 2 * margin + offset,), math.nan)
    return buffer.as_strided(tensor.shape, tensor.stride(), margin + offset).copy_(tensor)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same memory as leaves that require grad."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def gradient_like(output: Tensor) -> Tensor:
    """A random gradient of an output, in its memory format."""
    generator = torch.Generator().manual_seed(99)
    values = torch.randn(output.shape, generator=generator)
    return torch.empty_like(output).copy_(values)


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return leaves(*(tensor.double() for tensor in tensors))


def _own(
    compute: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], truths: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """PyTorch's own results in the tensors' dtype, or the truths rounded where it has none."""
    try:
        return compute(*leaves(*tensors))
    except RuntimeError:  # the same call has just succeeded in float64
        return tuple(truth.to(tensors[0].dtype) for truth in truths)


def _check_properties(output: Tensor, grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    assert output.dtype == tensors[0].dtype
    check_format(output, tensors[0])
    for grad, tensor in zip(grads, tensors, strict=True):
        assert grad.dtype == tensor.dtype
        assert grad.shape == tensor.shape
    check_format(grads[0], tensors[0])


def plain_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", **keys: Any
) -> Tensor:
    """The op in PyTorch, which has no (left, right, top, bottom) and no activation."""
    padding = keys.get("padding", 0)
    if not isinstance(padding, str | int) and len(padding) == 4:
        input, keys = F.pad(input, padding), {**keys, "padding": 0}
    output = F.conv2d(input, weight, bias, **keys)
    return output.relu() if activation == "relu" else output


def check_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    needs_input: bool = True,
    tf32: bool = False,
    **keys: Any,
) -> None:
    """Output and gradients of conv2d_bias_relu.

    Floor: a sum of K products in float32, in whatever order, is off by sqrt(K) * u * sum|terms|
    (rounding errors of K operations are independent and of mean zero: Higham and Mary 2019).
    Under TF32 both factors of each product are rounded to 11 bits first: 2 * 2**-11 * sum|terms|.
    sum|terms| is the same convolution of absolute values; K is the taps times the channels of a
    group for output (plus the bias) and input gradient, the pixels for the others.

    The ReLU lets a gradient through by the sign of the output, which rounding decides where the
    sum is near zero. It is checked as an output; the gradients' truths take it as it came.
    """
    tensors = [input, weight] if bias is None else [input, weight, bias]
    ours = leaves(*tensors)
    ours[0].requires_grad_(needs_input)
    wanted = slice(None) if needs_input else slice(1, None)
    output = ops.conv2d_bias_relu(*ours, activation=activation, **keys)
    upstream = gradient_like(output)
    grads = torch.autograd.grad(output, ours[wanted], upstream)

    def open_gate(result: Tensor) -> Tensor:
        gate = upstream.double()
        return gate if activation == "none" else gate.where(~(result <= 0), 0.0)

    def linear(operands: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        result = plain_conv(*operands, **keys)
        return result, torch.autograd.grad(result, operands[wanted], grad)

    def own_results(*operands: Tensor) -> tuple[Tensor, ...]:
        result = plain_conv(*operands, activation=activation, **keys)
        return result, *torch.autograd.grad(result, operands[wanted], upstream)

    doubles = _double(tensors)
    truth, truths = linear(doubles, open_gate(output))
    truth = truth.relu() if activation == "relu" else truth
    own, *own_grads = _own(own_results, tensors, [truth, *truths])
    _, own_truths = linear(doubles, open_gate(own))
    absolute = leaves(*(tensor.detach().abs() for tensor in doubles))
    terms, grad_terms = linear(absolute, open_gate(output).abs())

    if needs_input:
        _check_properties(output, grads, tensors)
    taps, pixels = weight[0, 0].numel(), output.numel() // weight.shape[0]
    group_out = weight.shape[0] // keys.get("groups", 1)
    lengths = [taps * group_out, pixels, pixels][wanted]

    def floor(magnitude: Tensor, length: int) -> Tensor:
        return magnitude * (UNIT * math.sqrt(length) + (2 * UNIT_TF32 if tf32 else 0.0))

    length = taps * weight.shape[1] + 1
    check("output", output, truth, (own - truth).abs(), floor(terms, length))
    names = ["input gradient", "weight gradient", "bias gradient"][wanted]
    for index, (name, grad) in enumerate(zip(names, grads, strict=False)):
        own_error = (own_grads[index] - own_truths[index]).abs()
        bound = floor(grad_terms[index], lengths[index])
        check(name, grad, truths[index], own_error, bound)


def plain_lrn(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    alpha_mode: str = "mean",
    groups: int = 1,
) -> Tensor:
    """The op in PyTorch, which divides alpha by size and has no groups."""
    alpha = alpha * size if alpha_mode == "sum" else alpha
    parts = input.chunk(groups, 1)
    return torch.cat([F.local_response_norm(part, size, alpha, beta, k) for part in parts], 1)


def window_sum(value: Tensor, before: int, after: int, groups: int) -> Tensor:
    """Sums over [c - before, c + after] within each of the groups of dimension 1."""
    grouped = value.movedim(1, -1).unflatten(-1, (groups, -1))
    sums = F.pad(grouped, (before, after)).unfold(-1, before + after + 1, 1).sum(-1)
    return sums.flatten(-2).movedim(-1, 1)


def check_lrn(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    alpha_mode: str = "mean",
    groups: int = 1,
    upstream: Tensor | None = None,
) -> None:
    """Output and gradient of local_response_norm.

    Floor, relative, in units of u, for k and alpha that are not negative (nothing cancels in d):
    - d = k + s * sum: size (squares and sum) + 4 (k, s, product, sum).
    - d**-beta: beta times that, plus the power itself. By roots (beta a multiple of 1/4): 10 per
      whole power (two roots of 2 ulp on a GPU and two products) and 12 for up to two roots of 2 ulp
      and their products. By exp2(-beta * log2 d): log2 is off by 1 relative and 4 absolute, beta
      and the product by 1 each, and exp2 turns an absolute error into ln 2 of it relative and adds
      4: ln 2 * beta * (3 * |log2 d| + 4) + 4.
    - y: 1 more.
    - t: that of the power, size + 4 + 9 for the division by d (two roots, a product), 2 products.
    - dx: size additions and 5 products for the second of its terms, 1 for their difference.
    """
    arguments = (size, alpha, beta, k, alpha_mode, groups)
    (ours,) = leaves(input)
    output = ops.local_response_norm(ours, *arguments)
    upstream = gradient_like(output) if upstream is None else upstream
    (grad,) = torch.autograd.grad(output, ours, upstream)
    _check_properties(output, [grad], [input])

    def results(value: Tensor) -> tuple[Tensor, ...]:
        result = plain_lrn(value, *arguments)
        return result, *torch.autograd.grad(result, value, upstream.to(value.dtype))

    (double,) = _double([input])
    truth, grad_truth = results(double)
    own, own_grad = _own(results, [input], [truth, grad_truth])

    output_floor, grad_floor = _lrn_floors(double.detach(), upstream.double(), *arguments)
    check("output", output, truth, (own - truth).abs(), output_floor)
    check("gradient", grad, grad_truth, (own_grad - grad_truth).abs(), grad_floor)


def _lrn_floors(
    x: Tensor,
    upstream: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    alpha_mode: str,
    groups: int,
    addends: int = 1,
) -> tuple[Tensor, Tensor]:
    """Of LRN's output and gradient, see check_lrn; ``upstream`` was summed from so many."""
    x, g = x.abs(), upstream.abs()
    scale = alpha if alpha_mode == "sum" else alpha / size
    before, after = size // 2, (size - 1) // 2
    d = k + scale * window_sum(x * x, before, after, groups)
    power = beta * (size + 4)
    if beta * 4 == int(beta * 4):
        power = power + 10 * int(beta) + 12
    else:
        power = power + math.log(2) * beta * (3 * d.log2().abs() + 4) + 4
    first = g * d**-beta
    second = 2 * scale * beta * x * window_sum(g * x * d ** (-beta - 1), after, before, groups)
    relative = power + addends
    grad = UNIT * ((relative + 1) * first + (relative + 2 * size + 20) * second)
    return UNIT * (power + 1) * x * d**-beta, grad


def check_pool(input: Tensor, kernel_size: int | tuple[int, int], **keys: Any) -> None:
    """Output, indices and gradient of max_pool2d.

    The output is a selection: equal to PyTorch's. Floor of the gradient: a pixel adds up the
    gradients of at most as many windows as there are taps.
    """
    (ours,) = leaves(input)
    output, indices = ops.max_pool2d(ours, kernel_size, return_indices=True, **keys)
    upstream = gradient_like(output)
    (grad,) = torch.autograd.grad(output, ours, upstream)
    _check_properties(output, [grad], [input])

    def results(value: Tensor, upstream: Tensor = upstream) -> tuple[Tensor, ...]:
        pooled, places = F.max_pool2d(value, kernel_size, return_indices=True, **keys)
        return pooled, places, *torch.autograd.grad(pooled, value, upstream.to(value.dtype))

    (double,) = _double([input])
    truth, places, grad_truth = results(double)
    own, _, own_grad = _own(results, [input], [truth, places, grad_truth])
    check_same(output.detach(), own.detach())
    check_same(indices, places)
    check_format(indices, input)
    with torch.no_grad():
        check_same(ops.max_pool2d(ours, kernel_size, **keys), own.detach())
    windows = math.prod((kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size)
    terms = results(double, upstream.abs())[2]
    check("gradient", grad, grad_truth, (own_grad - grad_truth).abs(), UNIT * windows * terms)


def check_lrn_pool(
    input: Tensor,
    size: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    upstream: Tensor | None = None,
    **norm: Any,
) -> None:
    """Output and gradient of lrn_max_pool2d.

    Floors: those of LRN, whose gradient is a sum over at most as many windows as there are taps.
    Where the two largest values of a window are closer than PyTorch's or our error, rounding
    decides which one gets the gradient: there the upstream gradient is zero.
    """
    pool = {"kernel_size": kernel_size, "stride": stride}
    norm = {"alpha": 1e-4, "beta": 0.75, "k": 1.0, "alpha_mode": "mean", "groups": 1, **norm}
    (ours,) = leaves(input)
    output = ops.lrn_max_pool2d(ours, size, **pool, **norm)

    def results(value: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        result = F.max_pool2d(plain_lrn(value, size, **norm), **pool)
        return result, *torch.autograd.grad(result, value, upstream.to(value.dtype))

    (double,) = _double([input])
    taps = math.prod((kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size)
    upstream = gradient_like(output) if upstream is None else upstream
    normalised = plain_lrn(double.detach(), size, **norm)
    zeros = torch.zeros_like(normalised)
    error, _ = _lrn_floors(double.detach(), zeros, size, *norm.values())
    error = error + torch.finfo(input.dtype).eps * normalised.abs()
    upstream = upstream.masked_fill(_undecided(normalised, error, **pool), 0.0)

    (grad,) = torch.autograd.grad(output, ours, upstream)
    _check_properties(output, [grad], [input])
    truth, grad_truth = results(double, upstream)
    own, own_grad = _own(lambda value: results(value, upstream), [input], [truth, grad_truth])
    (leaf,) = leaves(normalised)
    pooled = F.max_pool2d(leaf, **pool)
    (gathered,) = torch.autograd.grad(pooled, leaf, upstream.double().abs())
    floors = _lrn_floors(double.detach(), gathered, size, *norm.values(), addends=taps)
    check("output", output, truth, (own - truth).abs(), F.max_pool2d(floors[0], **pool))
    check("gradient", grad, grad_truth, (own_grad - grad_truth).abs(), floors[1])


def _undecided(value: Tensor, error: Tensor, kernel_size: Any, stride: Any) -> Tensor:
    """Windows whose two largest values are closer than their errors together."""
    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    steps = kernel if stride is None else (stride,) * 2 if isinstance(stride, int) else stride

    def windows(tensor: Tensor) -> Tensor:
        unfolded = tensor.unfold(2, kernel[0], steps[0]).unfold(3, kernel[1], steps[1])
        return unfolded.flatten(-2)

    values = windows(value)
    if values.shape[-1] == 1:
        return torch.zeros_like(values[..., 0], dtype=torch.bool)
    largest = values.topk(2).values
    return largest[..., 0] - largest[..., 1] <= 2 * windows(error).amax(-1)


def check_conv_lrn_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: dict[str, Any],
    size: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    norm_groups: int = 1,
    **norm: Any,
) -> None:
    """Output and gradients of conv2d_bias_relu_lrn_max_pool2d.

    It is made of kernels that other checks hold to the truth, so output, input and weight
    gradient are the very bits of conv2d_bias_relu and lrn_max_pool2d one after the other. The bias
    gradient is a sum of its own: in float32, of terms that are not rounded to half precision.
    Floor: sqrt(pixels) * u * sum|terms| (see check_conv) and those of LRN.
    """
    tensors = [input, weight] if bias is None else [input, weight, bias]
    pool = {"kernel_size": kernel_size, "stride": stride}
    ours, parts = leaves(*tensors), leaves(*tensors)
    output = ops.conv2d_bias_relu_lrn_max_pool2d(
        *ours,
        **conv,
        size=size,
        kernel_size=kernel_size,
        pool_stride=stride,
        norm_groups=norm_groups,
        **norm,
    )
    activation = ops.conv2d_bias_relu(*parts, **conv)
    expected = ops.lrn_max_pool2d(activation, size, **pool, groups=norm_groups, **norm)
    upstream = gradient_like(output)
    grads = torch.autograd.grad(output, ours, upstream)
    expected_grads = torch.autograd.grad(expected, parts, upstream)
    check_same(output.detach(), expected.detach())
    _check_properties(output, grads, tensors)
    for grad, other in zip(grads[:2], expected_grads[:2], strict=True):
        check_same(grad, other)
    if bias is None:
        return
    dtype = torch.promote_types(activation.dtype, torch.float32)
    (wide,) = leaves(activation.to(dtype))
    pooled = ops.lrn_max_pool2d(wide, size, **pool, groups=norm_groups, **norm)
    (terms,) = torch.autograd.grad(pooled, wide, upstream.to(dtype))
    terms = terms.double().where(activation > 0, 0.0)
    pixels = terms[:, 0].numel()
    truth, magnitude = terms.sum((0, 2, 3)), terms.abs().sum((0, 2, 3))
    own_error = (expected_grads[2] - truth).abs()
    check("bias gradient", grads[2], truth, own_error, UNIT * math.sqrt(pixels) * magnitude)


def check_dropout(
    input: Tensor, seed: Tensor, p: float = 0.5, mode: str = "inverted", **place: Any
) -> None:
    """Output and gradient of dropout with a given seed.

    Floor: the scale's own rounding to float32 and the product's. PyTorch draws other masks; its
    own result is its formula, input * (mask / (1 - p)) in the input's dtype, with this mask.
    """
    (ours,) = leaves(input)
    output = ops.dropout(ours, p, mode=mode, seed=seed, **place)
    upstream = gradient_like(output)
    (grad,) = torch.autograd.grad(output, ours, upstream)
    _check_properties(output, [grad], [input])
    shard = {"index_offset": 0, "row_stride": None, **place}
    keeps = reference.dropout_keeps(input.shape, p, seed.view(()), **shard)
    kept = 1.0 - p if mode == "inverted" and p < 1 else 1.0
    noise = keeps.to(input.dtype) / kept
    for what, result, value in (("output", output, input), ("gradient", grad, upstream)):
        truth = value.detach().double() * keeps / kept
        own_error = (value.detach() * noise - truth).abs()
        check(what, result, truth, own_error, 2 * UNIT * truth.abs())


def plain_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | float, activation: str
) -> Tensor:
    """The op in PyTorch, with a mask and scale that are given."""
    output = F.linear(input, weight, bias)
    return (output.relu() if activation == "relu" else output) * factor


def check_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    p: float = 0.5,
    training: bool = True,
    activation: str = "relu",
    mode: str = "inverted",
    **place: Any,
) -> None:
    """Output and gradients of linear_bias_relu_dropout with a given seed.

    Floor: that of a sum of K products (see :func:`check_conv`), and as for dropout the rounding
    of the scale and of its product. K is the inputs (and the bias) for the output, the outputs
    for the input gradient, the rows for the others.

    As for the convolution, gradients' truths take the ReLU's mask as it came. PyTorch draws other
    masks: its own result is its formula with this mask, as for dropout.
    """
    tensors = [input, weight] if bias is None else [input, weight, bias]
    ours = leaves(*tensors)
    keys = {"mode": mode, "seed": seed, **place}
    bias_of_ours = None if bias is None else ours[2]
    output = ops.linear_bias_relu_dropout(*ours[:2], bias_of_ours, p, training, activation, **keys)
    upstream = gradient_like(output)
    grads = torch.autograd.grad(output, ours, upstream)

    shard = {"index_offset": 0, "row_stride": None, **place}
    factor = torch.ones(output.shape, dtype=torch.float64, device=output.device)
    if training:
        factor *= reference.dropout_keeps(output.shape, p, seed.view(()), **shard)
        factor /= 1.0 - p if mode == "inverted" and p < 1 else 1.0
    elif mode == "paper":
        factor *= 1.0 - p

    def gated(result: Tensor) -> Tensor:
        gate = upstream.double() * factor
        return gate if activation == "none" else gate.where(~(result <= 0), 0.0)

    def results(
        operands: Sequence[Tensor], grad: Tensor, scaled: Tensor, activation: str
    ) -> tuple[Tensor, ...]:
        bias = operands[2] if len(operands) > 2 else None
        result = plain_linear(operands[0], operands[1], bias, scaled, activation)
        return result, *torch.autograd.grad(result, operands, grad)

    def own_results(*operands: Tensor) -> tuple[Tensor, ...]:
        return results(operands, upstream, factor.to(upstream.dtype), activation)

    doubles, ones = _double(tensors), torch.ones_like(factor)
    product, *truths = results(doubles, gated(output), ones, "none")
    truth = (product.relu() if activation == "relu" else product) * factor
    own, *own_grads = _own(own_results, tensors, [truth, *truths])
    own_truths = results(doubles, gated(own), ones, "none")[1:]
    absolute = leaves(*(tensor.detach().abs() for tensor in doubles))
    terms, *grad_terms = results(absolute, gated(output).abs(), ones, "none")

    assert output.dtype == input.dtype
    assert output.is_contiguous()
    rows = output.numel() // weight.shape[0]
    scaling = 2 * UNIT * truth.abs()
    floor = UNIT * math.sqrt(weight.shape[1] + 1) * terms * factor + scaling
    check("output", output, truth, (own - truth).abs(), floor)
    names = ("input gradient", "weight gradient", "bias gradient")
    lengths = (weight.shape[0], rows, rows)
    for index, grad in enumerate(grads):
        assert grad.dtype == tensors[index].dtype
        own_error = (own_grads[index] - own_truths[index]).abs()
        floor = UNIT * (math.sqrt(lengths[index]) + 2) * grad_terms[index]
        check(names[index], grad, truths[index], own_error, floor)


def plain_augment(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: float = 1.0,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Centred pixels and the op's result, image by image, in numpy's float64."""
    height, width, _ = mean.shape
    crops = []
    for image, (top, left), flip in zip(
        images.cpu().numpy(), corners.tolist(), flips.tolist(), strict=True
    ):
        top = sorted((0, top, image.shape[0] - height))[1]
        left = sorted((0, left, image.shape[1] - width))[1]
        crop = image[top : top + height, left : left + width]
        crops.append(np.fliplr(crop) if flip else crop)
    centred = np.array(crops, np.float64) - mean.cpu().double().numpy()
    shifts = 0.0 if shift is None else shift.cpu().double().numpy()[:, None, None]
    return tuple(
        torch.from_numpy(value).to(images.device).permute(0, 3, 1, 2)
        for value in (centred, (centred + shifts) / std)
    )


def check_augment(
    images: Tensor,
    corners: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: float = 1.0,
    shift: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    space_to_depth: int = 1,
) -> None:
    """The output of augment, and in float32 that its bits are those of the reference.

    Floor: the rounding of the difference, relative to it, and those of the sum, of 1 / std and of
    the product, relative to the result. PyTorch has no such op: its result is the rounded truth.
    """
    arguments = images, corners, flips, mean, std, shift
    packing: dict[str, Any] = {"padding": padding, "space_to_depth": space_to_depth}
    output = ops.augment(*arguments, dtype=dtype, **packing)
    assert output.dtype == dtype
    assert output.permute(0, 2, 3, 1).is_contiguous()
    centred, truth = (
        F.pixel_unshuffle(F.pad(crops, padding), space_to_depth)
        for crops in plain_augment(*arguments)
    )
    floor = UNIT * (centred.abs() / std + 3 * truth.abs())
    check("output", output, truth, (truth.to(dtype) - truth).abs(), floor)
    if dtype == torch.float32:
        with use_backend("torch"):
            check_same(output, ops.augment(*arguments, **packing))
