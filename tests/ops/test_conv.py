import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    LAYOUTS,
    check_conv,
    check_format,
    check_refusal,
    check_same,
    leaves,
    plain_conv,
)

import alexkern
from alexkern import ops
from alexkern.runtime import config
from alexkern.runtime.config import shipped_configurations
from alexkern.runtime.launch import record_launches

# input [N, C, H, W], weight [C_out, C // groups, height, width], keywords
PAPER = {
    "conv1": ((1, 3, 224, 224), (96, 3, 11, 11), {"stride": 4, "padding": (0, 3, 0, 3)}),
    "conv2": ((1, 96, 27, 27), (256, 48, 5, 5), {"padding": 2, "groups": 2}),
    "conv3": ((1, 256, 13, 13), (384, 256, 3, 3), {"padding": 1}),
    "conv4": ((2, 384, 13, 13), (384, 192, 3, 3), {"padding": 1, "groups": 2}),
    "conv5": ((2, 384, 13, 13), (256, 192, 3, 3), {"padding": 1, "groups": 2}),
}
GEOMETRIES = {
    "conv1 small": ((2, 3, 30, 31), (96, 3, 11, 11), {"stride": 4, "padding": (0, 3, 0, 3)}),
    "primes": ((2, 3, 13, 11), (7, 3, 5, 3), {"stride": (2, 3), "padding": (2, 1)}),
    "one tap": ((3, 5, 7, 4), (2, 5, 1, 1), {}),
    "one pixel": ((2, 3, 1, 1), (4, 3, 1, 1), {}),
    "whole image": ((2, 3, 5, 4), (6, 3, 5, 4), {}),
    "stride beyond kernel": ((2, 2, 9, 8), (3, 2, 2, 1), {"stride": 3}),
    "padding beyond kernel": ((1, 2, 3, 3), (3, 2, 2, 2), {"padding": 4}),
    "dilation and stride share a factor": (
        (2, 3, 14, 13),
        (4, 3, 3, 4),
        {"dilation": (2, 3), "padding": (3, 1), "stride": (4, 6)},
    ),
    "stem with 48 channels": ((2, 3, 23, 18), (5, 3, 7, 6), {"stride": 4, "padding": (1, 2, 3, 0)}),
    "stem with odd blocks": ((2, 2, 14, 13), (4, 2, 5, 4), {"stride": (2, 3), "padding": 1}),
    "dilated": ((2, 2, 11, 9), (3, 2, 3, 2), {"dilation": (3, 2), "padding": 2, "stride": 2}),
    "same": ((2, 3, 6, 7), (4, 3, 4, 3), {"padding": "same", "dilation": (1, 2)}),
    "valid": ((2, 3, 6, 7), (4, 3, 4, 3), {"padding": "valid"}),
    "four sides": ((2, 3, 6, 7), (4, 3, 3, 3), {"padding": (0, 1, 2, 3), "stride": 2}),
    "groups": ((2, 6, 5, 5), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((2, 5, 6, 6), (10, 1, 3, 3), {"groups": 5, "padding": 1}),
    "no activation": ((2, 3, 6, 5), (4, 3, 3, 3), {"activation": "none"}),
    "unbatched": ((3, 6, 5), (4, 3, 3, 3), {"padding": 1}),
}


def operands(randn, input_shape, weight_shape, dtype=torch.float32, layout="nchw"):
    """Random operands; the weight is scaled so that outputs have about unit variance."""
    scale = 1 / math.sqrt(math.prod(weight_shape[1:]))
    layout = layout if len(input_shape) > 3 else "nchw"
    weight = randn(*weight_shape, dtype=dtype, layout=layout, seed=1) * scale
    return randn(*input_shape, dtype=dtype, layout=layout), weight, randn(len(weight), dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "nchw"),
        (torch.float32, "channels_last"),
        (torch.float16, "channels_last"),
        (torch.bfloat16, "channels_last"),
        pytest.param(torch.float16, "nchw", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "nchw", marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", PAPER)
def test_paper(randn, triton, layer, dtype, layout):
    input_shape, weight_shape, keys = PAPER[layer]
    # as in the network, nobody asks for the gradient of the image
    needs_input = layer != "conv1"
    tensors = operands(randn, input_shape, weight_shape, dtype, layout)
    check_conv(*tensors, needs_input=needs_input, **keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry(randn, backend, geometry, dtype):
    input_shape, weight_shape, keys = GEOMETRIES[geometry]
    check_conv(*operands(randn, input_shape, weight_shape, dtype), **keys)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", ["primes", "four sides", "groups", "no activation"])
def test_the_vendors_products_with_our_bias_and_relu(
    randn, triton, vendor, launches, geometry, layout
):
    input_shape, weight_shape, keys = GEOMETRIES[geometry]
    check_conv(*operands(randn, input_shape, weight_shape, layout=layout), **keys)
    names = [made.kernel.fn.__name__ for made in launches]
    assert names == ["conv2d_epilogue", "conv2d_epilogue_backward", "sum_partials"]


@pytest.mark.parametrize("geometry", ["primes", "four sides", "groups", "depthwise"])
def test_geometry_channels_last_without_bias(randn, backend, geometry):
    input_shape, weight_shape, keys = GEOMETRIES[geometry]
    input, weight, _ = operands(randn, input_shape, weight_shape, layout="channels_last")
    check_conv(input, weight, **keys)


@st.composite
def convolutions(draw):
    def sides(least, most):
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    groups, kernel, dilation = draw(st.integers(1, 3)), sides(1, 4), sides(1, 2)
    group_in, group_out = sides(1, 4)
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    height, width = sides(1, 9)
    assume(height + padding[2] + padding[3] > dilation[0] * (kernel[0] - 1))
    assume(width + padding[0] + padding[1] > dilation[1] * (kernel[1] - 1))
    keys = {"stride": sides(1, 3), "padding": padding, "dilation": dilation, "groups": groups}
    keys["activation"] = draw(st.sampled_from(["relu", "none"]))
    shapes = (
        (draw(st.integers(1, 3)), groups * group_in, height, width),
        (groups * group_out, group_in, *kernel),
    )
    return *shapes, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)), keys


def check_convolution(randn, case):
    *tensors, keys = case
    with alexkern.use_backend("triton"):
        check_conv(*operands(randn, *tensors), **keys)


@given(convolutions())
def test_any(randn, case):
    check_convolution(randn, case)


@pytest.mark.slow
@settings(max_examples=400)
@given(convolutions())
def test_any_long(randn, case):
    check_convolution(randn, case)


@st.composite
def wide_convolutions(draw):
    """Kernels to 11, strides to 4, channels to 97 and groups of any number that divides them."""
    kernel, stride, dilation = draw(
        st.tuples(*[st.tuples(*[st.integers(1, most)] * 2) for most in (11, 4, 3)])
    )
    in_channels = draw(st.integers(1, 97))
    divisors = [g for g in range(1, in_channels + 1) if in_channels % g == 0]
    groups = draw(st.sampled_from(divisors))
    group_out = draw(st.integers(1, max(1, 97 // groups)))
    padding = draw(st.tuples(*[st.integers(0, 5)] * 4))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(1, 5)) + span for span in spans]
    keys = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shapes = (2, in_channels, *size), (groups * group_out, in_channels // groups, *kernel)
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return *shapes, dtype, draw(st.sampled_from(LAYOUTS)), keys


@pytest.mark.slow
@settings(max_examples=60)
@given(wide_convolutions())
def test_sweep(randn, case):
    check_convolution(randn, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("layer", PAPER)
def test_paper_in_batches(randn, triton, layer, batch, dtype):
    (_, *image), weight_shape, keys = PAPER[layer]
    tensors = operands(randn, (batch, *image), weight_shape, dtype, "channels_last")
    check_conv(*tensors, needs_input=layer != "conv1", **keys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="batch 128 needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", PAPER)
def test_paper_at_its_batch(randn, triton, layer, dtype):
    (_, *image), weight_shape, keys = PAPER[layer]
    tensors = operands(randn, (128, *image), weight_shape, dtype, "channels_last")
    check_conv(*tensors, needs_input=layer != "conv1", **keys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2**31 elements need a GPU")
def test_offsets_beyond_32_bits(triton, device):
    """The last image of a large batch is computed as it is alone, and so are its gradients."""
    batch = 2**31 // (64 * 64 * 64) + 2
    image = torch.randn(batch, 64, 64, 64, device=device, dtype=torch.bfloat16)
    image = image.to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(16, 64, 3, 3, device=device, dtype=torch.bfloat16) / 24
    last = image.detach()[-1:].clone(memory_format=torch.channels_last).requires_grad_()
    output = ops.conv2d_bias_relu(image, weight, None, 2, 1)
    alone = ops.conv2d_bias_relu(last, weight, None, 2, 1)
    torch.testing.assert_close(output[-1:], alone, rtol=2**-7, atol=2**-7)
    output.backward(torch.ones_like(output))
    alone.backward(torch.ones_like(alone))
    torch.testing.assert_close(image.grad[-1:], last.grad, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "input_shape", "weight_shape"),
    [
        (torch.float32, (1, 2, 64, 65), (5, 2, 1, 1)),
        (torch.float32, (2, 16, 20, 20), (16, 16, 3, 3)),
        (torch.float16, (1, 3, 48, 48), (70, 3, 2, 2)),
        (torch.bfloat16, (2, 16, 34, 32), (48, 16, 3, 3)),
        (torch.float16, (3, 16, 32, 32), (80, 16, 1, 1)),
    ],
    ids=str,
)
def test_shipped_configurations(randn, triton, launches, dtype, input_shape, weight_shape, layout):
    tensors = operands(randn, input_shape, weight_shape, dtype, layout)
    with shipped_configurations():
        check_conv(*tensors)
    grids = {made.kernel.fn.__name__: made.grid for made in launches}
    assert grids["conv2d_weight_grad"][1] > 1
    if layout == "channels_last" or input_shape[2] == 64:
        assert grids["conv2d_epilogue_backward"][1] > 1


BOXES = {
    "one pixel of all images": (16, {"padding": 1}),
    "two pixels, more images than a box": (32, {"padding": (2, 1, 1, 2), "dilation": (1, 2)}),
    "four pixels, groups": (64, {"padding": 2, "groups": 2, "dilation": (2, 1)}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BOXES)
def test_boxes(randn, triton, launches, case, dtype):
    """Operands loaded by tensor descriptors, one pixel's taps left out where they lie outside."""
    block_m, keys = BOXES[case]
    shapes = (13, 64, 5, 6), (96, 64 // keys.get("groups", 1), 3, 3)
    tensors = operands(randn, *shapes, dtype, "channels_last")
    with config.forced(config.MatmulConfig(block_m, 32, 16, 4, 2, boxes=True)):
        check_conv(*tensors, **keys)
    assert [made.kernel.fn.__name__ for made in launches].count("conv2d_boxes") == 2


def test_weight_gradient_by_boxes_of_a_strided_convolution(randn, triton):
    input, weight, bias = operands(randn, (9, 32, 8, 7), (48, 32, 3, 2), layout="channels_last")
    weight.requires_grad_()
    with config.forced(config.MatmulConfig(32, 16, 16, 4, 2)):
        output = ops.conv2d_bias_relu(input, weight, bias, (3, 2), 1)
    with config.forced(config.MatmulConfig(32, 16, 16, 4, 2, boxes=True)):
        output.sum().backward()
    exact = input.double(), weight.detach().double().requires_grad_(), bias.double()
    F.conv2d(*exact, (3, 2), 1).relu().sum().backward()
    assert (weight.grad - exact[1].grad).abs().max() < 1e-5 * exact[1].grad.abs().max()


def test_boxes_refuse_what_they_do_not_fit(randn, triton):
    boxes = config.MatmulConfig(16, 16, 16, 4, 2, boxes=True)
    for channels, layout, stride in ((8, "channels_last", 1), (16, "nchw", 1), (16, LAYOUTS[1], 2)):
        tensors = operands(randn, (2, channels, 6, 5), (16, channels, 3, 3), layout=layout)
        with config.forced(boxes), pytest.raises(RuntimeError, match="boxes"):
            ops.conv2d_bias_relu(*tensors, stride=stride)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_finite(randn, backend, layout):
    """NaN and infinities spread as far as the window reaches, and ReLU keeps NaN."""
    input, weight, bias = operands(randn, (2, 3, 9, 8), (4, 3, 3, 3), layout=layout)
    for place, value in enumerate([math.nan, math.inf, -math.inf]):
        input[0, place, 1 + 3 * place, 2 * place] = value
    output = ops.conv2d_bias_relu(input, weight, bias)
    truth = plain_conv(input.double(), weight.double(), bias.double(), "relu")
    assert truth.isnan().any()
    assert truth.isinf().any()
    assert torch.equal(output.isnan(), truth.isnan())
    assert torch.equal(output.isinf(), truth.isinf())


def test_relu_at_nan_and_zero(device, backend):
    """The gradient passes at NaN and stops at zero, as in torch.relu; -0.0 stays -0.0."""
    values = torch.tensor([math.nan, 0.0, -0.0, 1e-40, -1e-40, math.inf, -math.inf, 2.0])
    values = values.to(device).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, device=device)
    ours, theirs = leaves(values, values)
    output, expected = ops.conv2d_bias_relu(ours, one), F.relu(theirs)
    (grad,) = torch.autograd.grad(output, ours, torch.ones_like(output))
    (expected_grad,) = torch.autograd.grad(expected, theirs, torch.ones_like(expected))
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())
    check_same(grad, expected_grad)


@pytest.mark.parametrize("needs_bias", [False, True])
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
def test_only_wanted_gradients(randn, triton, launches, needs_input, needs_weight, needs_bias):
    wanted = (needs_input, needs_weight, needs_bias)
    tensors = operands(randn, (2, 3, 6, 5), (4, 3, 3, 3))
    for tensor, needed in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(needed)
    output = ops.conv2d_bias_relu(*tensors)
    assert output.requires_grad == any(wanted)
    launches.clear()
    if any(wanted):
        output.sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == list(wanted)
    names = [made.kernel.fn.__name__ for made in launches]
    assert names.count("conv2d") == needs_input
    assert names.count("conv2d_weight_grad") == needs_weight
    assert names.count("conv2d_epilogue_backward") == any(wanted)
    assert names.count("sum_partials") == needs_bias


def test_autocast(randn, backend, device):
    tensors = leaves(*operands(randn, (2, 3, 6, 5), (4, 3, 3, 3)))
    with torch.autocast(device.type, torch.bfloat16):
        output = ops.conv2d_bias_relu(*tensors)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert [tensor.grad.dtype for tensor in tensors] == [torch.float32] * 3
    low = leaves(*(tensor.bfloat16() for tensor in tensors))
    expected = ops.conv2d_bias_relu(*low)
    expected.sum().backward()
    check_same(output.detach(), expected.detach())
    for tensor, cast in zip(tensors, low, strict=True):
        check_same(tensor.grad, cast.grad.float())


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_follows_torch(randn, triton, precision):
    torch.backends.cudnn.conv.fp32_precision = precision
    with record_launches() as launches:
        ops.conv2d_bias_relu(*operands(randn, (2, 3, 6, 5), (4, 3, 3, 3)))
    assert launches[0].constants["PRECISION"] == precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 needs a GPU")
@pytest.mark.parametrize("layer", ["conv2", "conv3"])
def test_tf32(randn, triton, layer):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    input_shape, weight_shape, keys = PAPER[layer]
    check_conv(*operands(randn, input_shape, weight_shape), tf32=True, **keys)


def test_strided_weight_and_gradient(randn, backend):
    """Operands and upstream gradients that are not dense are taken by value."""
    input, weight, bias = operands(randn, (2, 3, 6, 5), (4, 3, 3, 3))
    check_conv(input, weight.transpose(2, 3), bias.flip(0)[::2].repeat_interleave(2))
    check_conv(input, weight[:1].expand(4, 3, 3, 3), bias[:1].expand(4))
    strange, usual = leaves(input, input)
    ops.conv2d_bias_relu(strange, weight, bias).sum().backward()
    output = ops.conv2d_bias_relu(usual, weight, bias)
    output.backward(torch.ones_like(output))
    check_same(strange.grad, usual.grad)


def test_gradient_keeps_the_inputs_format_where_the_output_has_one_pixel(randn, triton):
    input, weight, _ = operands(randn, (2, 3, 5, 4), (6, 3, 5, 4), layout="channels_last")
    (input,) = leaves(input)
    (grad,) = torch.autograd.grad(ops.conv2d_bias_relu(input, weight).sum(), input)
    check_format(grad, input)


def test_channels_last_weight_keeps_its_format(randn, triton):
    tensors = leaves(*operands(randn, (2, 3, 6, 5), (4, 3, 3, 3), layout="channels_last"))
    ops.conv2d_bias_relu(*tensors).sum().backward()
    check_format(tensors[1].grad, tensors[1])


IMAGE, WEIGHT = (2, 4, 6, 5), (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "bias_shape", "keys", "named"),
    [
        ((4, 5), WEIGHT, None, {}, "[4, 5]"),
        ((1, 2, 4, 6, 5), WEIGHT, None, {}, "[1, 2, 4, 6, 5]"),
        (IMAGE, (6, 4, 3), None, {}, "[6, 4, 3]"),
        (IMAGE, (6, 3, 3, 3), None, {}, "4 channels"),
        (IMAGE, (6, 2, 3, 3), None, {"groups": 4}, "groups=4"),
        (IMAGE, (3, 2, 3, 3), None, {"groups": 2}, "[3, 2, 3, 3]"),
        (IMAGE, WEIGHT, None, {"groups": 0}, "groups=0"),
        (IMAGE, (0, 4, 3, 3), None, {}, "[0, 4, 3, 3]"),
        (IMAGE, WEIGHT, (5,), {}, "[5]"),
        (IMAGE, WEIGHT, (6, 1), {}, "[6, 1]"),
        (IMAGE, WEIGHT, None, {"stride": 0}, "(0, 0)"),
        (IMAGE, WEIGHT, None, {"stride": (1, 2, 3)}, "(1, 2, 3)"),
        (IMAGE, WEIGHT, None, {"stride": 1.5}, "1.5"),
        (IMAGE, WEIGHT, None, {"dilation": (1, 0)}, "(1, 0)"),
        (IMAGE, WEIGHT, None, {"dilation": (1.0, 2)}, "(1.0, 2)"),
        (IMAGE, WEIGHT, None, {"padding": -1}, "-1"),
        (IMAGE, WEIGHT, None, {"padding": 0.5}, "0.5"),
        (IMAGE, WEIGHT, None, {"padding": "full"}, "full"),
        (IMAGE, WEIGHT, None, {"padding": "same", "stride": 2}, "(2, 2)"),
        (IMAGE, (6, 4, 7, 3), None, {}, "(7 x 3)"),
        (IMAGE, WEIGHT, None, {"dilation": 3}, "(7 x 7)"),
        ((2, 4, 0, 5), WEIGHT, None, {}, "(0 x 5)"),
    ],
    ids=str,
)
def test_refuses_what_torch_refuses(device, input_shape, weight_shape, bias_shape, keys, named):
    shapes = (input_shape, weight_shape, bias_shape)
    tensors = [None if shape is None else torch.zeros(shape, device=device) for shape in shapes]
    check_refusal(F.conv2d, ops.conv2d_bias_relu, named, *tensors, **keys)


def test_refuses_mixed_dtypes(device):
    image, weight = torch.zeros(IMAGE, device=device), torch.zeros(WEIGHT, device=device)
    check_refusal(F.conv2d, ops.conv2d_bias_relu, "float16", image, weight.half())
    bias = torch.zeros(6, device=device).double()
    check_refusal(F.conv2d, ops.conv2d_bias_relu, "float64", image, weight, bias)


def test_refuses_unknown_activation(backend):
    with pytest.raises(ValueError, match="gelu"):
        ops.conv2d_bias_relu(torch.zeros(IMAGE), torch.zeros(WEIGHT), activation="gelu")


@pytest.mark.parametrize("padding", [(0, -1, 0, 0), (0, 0, 0, 1.5), (1, 2, 3), (1, 2, 3, 4, 5)])
def test_refuses_bad_sides(backend, padding):
    with pytest.raises((RuntimeError, TypeError)) as raised:
        ops.conv2d_bias_relu(torch.zeros(IMAGE), torch.zeros(WEIGHT), padding=padding)
    assert str(padding) in str(raised.value)
