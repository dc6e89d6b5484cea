import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, check_conv_lrn_pool, check_same, leaves, plain_conv, plain_lrn

from alexkern import ops
from alexkern.runtime.config import shipped_configurations

TAIL = {"size": 5, "kernel_size": 3, "alpha": 0.5}
POOL = {"stride": 2}

# image, weight, keywords of the convolution
LAYERS = {
    "first": ((2, 3, 25, 26), (16, 3, 5, 5), {"stride": 2, "padding": (0, 1, 0, 1)}),
    "grouped": ((2, 8, 9, 11), (16, 4, 3, 3), {"padding": 1, "groups": 2}),
    "odd channels": ((1, 5, 8, 7), (7, 5, 2, 3), {"dilation": (2, 1)}),
    "unbatched": ((4, 9, 9), (8, 4, 3, 3), {"padding": "same"}),
}


def make(randn, layer, dtype=torch.float32, layout="nchw", scale=1.0):
    image, weight, keywords = LAYERS[layer]
    layout = layout if len(image) == 4 else "nchw"
    fan_in = weight[1] * weight[2] * weight[3]
    return (
        randn(*image, dtype=dtype, layout=layout),
        randn(*weight, dtype=dtype, seed=1) * (scale / fan_in**0.5),
        randn(weight[0], dtype=dtype, seed=2),
        keywords,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("layer", ["first", "grouped", "odd channels"])
def test_layers(randn, triton, layer, dtype, layout):
    input, weight, bias, keywords = make(randn, layer, dtype, layout)
    check_conv_lrn_pool(input, weight, bias, keywords, **TAIL, **POOL)


def test_without_bias_and_with_groups_of_the_norm(randn, triton):
    input, weight, _, keywords = make(randn, "grouped", layout="channels_last")
    check_conv_lrn_pool(input, weight, None, keywords, **TAIL, **POOL, norm_groups=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_against_float64(randn, backend, layer, layout):
    """The whole chain at once; the sums of the convolution bound how well it can be met."""
    input, weight, bias, keywords = make(randn, layer, layout=layout)
    check_against_float64(input, weight, bias, keywords)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", ["first", "grouped", "unbatched"])
def test_with_the_vendors_convolution(randn, triton, vendor, launches, layer, layout):
    input, weight, bias, keywords = make(randn, layer, layout=layout)
    check_against_float64(input, weight, bias, keywords)
    assert {made.kernel.__name__ for made in launches} >= {"lrn_max_pool_forward"}
    convolutions = {made.kernel.__name__ for made in launches if "conv2d" in made.kernel.__name__}
    assert convolutions == {"conv2d_epilogue"}


def check_against_float64(input, weight, bias, keywords):
    """Relative to the largest value, 1000 roundings: mistakes are larger by far."""
    ours, doubles = (
        leaves(input, weight, bias),
        leaves(input.double(), weight.double(), bias.double()),
    )
    output = ops.conv2d_bias_relu_lrn_max_pool2d(*ours, **keywords, **TAIL, pool_stride=2)
    maps = plain_conv(*doubles, activation="relu", **keywords)
    batch = maps if maps.dim() == 4 else maps[None]
    truth = F.max_pool2d(plain_lrn(batch, 5, 0.5), 3, 2).reshape(output.shape)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    grads = torch.autograd.grad(output, ours, upstream)
    truths = torch.autograd.grad(truth, doubles, upstream.double())
    for actual, expected in zip((output, *grads), (truth, *truths), strict=True):
        error = (actual.double() - expected).abs().max()
        assert error <= 1000 * 2**-24 * expected.abs().max()


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("vendors", [False, True])
def test_only_the_gradients_that_are_asked_for(randn, triton, launches, request, needs, vendors):
    if vendors:
        request.getfixturevalue("vendor")
    input, weight, bias, keywords = make(randn, "grouped", layout="channels_last")
    full = leaves(input, weight, bias)
    expected = ops.conv2d_bias_relu_lrn_max_pool2d(*full, **keywords, **TAIL, pool_stride=2)
    upstream = torch.ones_like(expected)
    expected_grads = torch.autograd.grad(expected, full, upstream)
    some = [t.detach().requires_grad_(index in needs) for index, t in enumerate(full)]
    output = ops.conv2d_bias_relu_lrn_max_pool2d(*some, **keywords, **TAIL, pool_stride=2)
    launches.clear()
    grads = torch.autograd.grad(output, [some[index] for index in needs], upstream)
    for index, grad in zip(needs, grads, strict=True):
        check_same(grad, expected_grads[index])
    names = [made.kernel.__name__ for made in launches]
    assert names[0] == "lrn_max_pool_backward"
    assert launches[0].constants["BIAS"] == (2 in needs)
    assert ("conv2d" in names) == (0 in needs and not vendors)
    assert ("conv2d_weight_grad" in names) == (1 in needs and not vendors)


def test_shipped_configurations_sum_over_several_programs(randn, triton, vendor, launches):
    """The bias gradient is cut into partial sums, with cells left over in the last."""
    input = randn(2, 4, 27, 25, layout="channels_last")
    with shipped_configurations():
        check_against_float64(input, randn(32, 4, 1, 1, seed=1), randn(32, seed=2), {})
    *_, backward = launches
    assert backward.constants["BIAS"]
    assert backward.constants["CHUNKS_PER_PROGRAM"] == 4
    assert backward.grid[0] > 2


@pytest.mark.parametrize("vendors", [False, True])
def test_nan_passes_the_relu(randn, triton, request, vendors):
    """Its mask lets NaN through, as PyTorch's does: every gradient has it where PyTorch has."""
    if vendors:
        request.getfixturevalue("vendor")
    input, weight, bias, keywords = make(randn, "grouped", layout="channels_last")
    bias[3] = float("nan")
    ours, doubles = (
        leaves(input, weight, bias),
        leaves(*(t.double() for t in (input, weight, bias))),
    )
    output = ops.conv2d_bias_relu_lrn_max_pool2d(*ours, **keywords, **TAIL, pool_stride=2)
    maps = plain_conv(*doubles, activation="relu", **keywords)
    truth = F.max_pool2d(plain_lrn(maps, 5, 0.5), 3, 2)
    assert torch.equal(output.isnan(), truth.isnan())
    grads = torch.autograd.grad(output.sum(), ours)
    truths = torch.autograd.grad(truth.sum(), doubles)
    for grad, expected in zip(grads[1:], truths[1:], strict=True):
        assert expected.isnan().any()
        assert torch.equal(grad.isnan(), expected.isnan())


def test_what_one_pass_does_not_take(randn, triton, launches):
    input, weight, bias, keywords = make(randn, "grouped")
    arguments = {**TAIL, "pool_stride": 2, "pool_padding": 1}
    output = ops.conv2d_bias_relu_lrn_max_pool2d(input, weight, bias, **keywords, **arguments)
    assert [made.kernel.__name__ for made in launches][1:] == ["lrn_forward", "max_pool_forward"]
    maps = ops.local_response_norm(ops.conv2d_bias_relu(input, weight, bias, **keywords), 5, 0.5)
    check_same(output, ops.max_pool2d(maps, 3, 2, 1))


def test_autocast(randn, triton):
    operands = make(randn, "grouped")[:3]
    keywords = {**LAYERS["grouped"][2], **TAIL, "pool_stride": 2}
    with torch.autocast(operands[0].device.type, torch.bfloat16):
        output = ops.conv2d_bias_relu_lrn_max_pool2d(*operands, **keywords)
    halves = [operand.bfloat16() for operand in operands]
    check_same(output, ops.conv2d_bias_relu_lrn_max_pool2d(*halves, **keywords))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"groups": 3}, RuntimeError, "groups=3"),
        ({"norm_groups": 5}, ValueError, "groups=5"),
        ({"size": 0}, RuntimeError, "0"),
        ({"kernel_size": 20}, RuntimeError, "Output size is too small"),
        ({"pool_padding": 2}, RuntimeError, "pad=2"),
        ({"alpha_mode": "max"}, ValueError, "max"),
        ({"stride": 0}, RuntimeError, "stride"),
    ],
)
def test_refusals(randn, backend, launches, change, error, named):
    """Before anything is computed."""
    input, weight, bias, keywords = make(randn, "grouped")
    with pytest.raises(error, match=named):
        ops.conv2d_bias_relu_lrn_max_pool2d(
            input, weight, bias, **{**keywords, **TAIL, "pool_stride": 2, **change}
        )
    assert not launches
