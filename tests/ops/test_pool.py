import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    LAYOUTS,
    check_pool,
    check_refusal,
    check_same,
    leaves,
)

import alexkern
from alexkern import ops
from alexkern.runtime.config import PointwiseConfig, forced, shipped_configurations

# input, kernel, keywords
GEOMETRIES = {
    "paper": ((2, 3, 13, 13), 3, {"stride": 2}),
    "half a stride of padding": ((2, 3, 8, 6), 3, {"stride": 2, "padding": 1}),
    "apart": ((2, 3, 8, 9), 2, {}),
    "gaps": ((2, 2, 9, 11), 2, {"stride": 3}),
    "sides differ": ((2, 3, 7, 11), (2, 3), {"stride": (1, 2), "padding": (1, 1)}),
    "dense": ((1, 2, 6, 5), (3, 2), {"stride": 1, "padding": 1}),
    "dilated": ((1, 2, 13, 11), 3, {"stride": 2, "dilation": (2, 3), "padding": 1}),
    "ceil": ((2, 2, 8, 10), 3, {"stride": 2, "ceil_mode": True}),
    "ceil and padding": ((2, 2, 7, 6), 3, {"stride": 3, "padding": 1, "ceil_mode": True}),
    "ceil drops a window": ((1, 1, 4, 4), 2, {"stride": 3, "padding": 1, "ceil_mode": True}),
    "whole image": ((2, 3, 5, 4), (5, 4), {}),
    "one pixel": ((2, 3, 1, 1), 1, {}),
    "every other pixel": ((2, 3, 6, 7), 1, {"stride": 2}),
    "a stride of padding": ((2, 3, 8, 7), (4, 5), {"stride": (1, 2), "padding": 2}),
    "long stride": ((2, 3, 11, 9), (1, 3), {"stride": (1, 4), "padding": (0, 1)}),
    "30 taps": (
        (2, 3, 14, 17),
        (6, 5),
        {"stride": (2, 3), "padding": (3, 1), "dilation": (2, 3), "ceil_mode": True},
    ),
    "unbatched": ((3, 7, 6), 3, {"stride": 2}),
    "256 taps": ((1, 2, 17, 18), 16, {"stride": 1}),
    "289 taps": ((1, 2, 18, 17), 17, {"stride": 1, "padding": 3}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 55, 55), (1, 256, 27, 27), (2, 256, 13, 13)], ids=str)
def test_paper(randn, triton, shape, dtype, layout):
    check_pool(randn(*shape, dtype=dtype, layout=layout), 3, stride=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry(randn, backend, geometry, layout):
    shape, kernel, keywords = GEOMETRIES[geometry]
    layout = layout if len(shape) == 4 else "nchw"
    check_pool(randn(*shape, layout=layout), kernel, **keywords)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "geometry", [name for name in GEOMETRIES if name[:3] not in ("256", "289")]
)
def test_gradient_is_a_sum_in_the_order_of_the_windows(randn, triton, geometry, layout):
    """As PyTorch computes it on a CPU: the same bits, so that -0.0 alone gives 0.0, too."""
    shape, kernel, keywords = GEOMETRIES[geometry]
    layout = layout if len(shape) == 4 else "nchw"
    ours, theirs = leaves(*[randn(*shape, layout=layout)] * 2)
    theirs = theirs.cpu().contiguous().detach().requires_grad_()
    output = ops.max_pool2d(ours, kernel, **keywords)
    upstream = randn(*output.shape, seed=7) * randn(*output.shape, seed=8).relu()
    output.backward(upstream)
    F.max_pool2d(theirs, kernel, **keywords).backward(upstream.cpu())
    assert (upstream == 0).any()
    check_same(ours.grad.cpu(), theirs.grad)


# kernel, keywords; whether taps are unrolled forward, INSIDE, backward's kernel
PATHS = {
    "paper": (3, {"stride": 2}, True, True, "max_pool_backward"),
    "padding": (3, {"stride": 2, "padding": 1}, True, False, "max_pool_backward"),
    "overhang": (3, {"stride": (2, 1), "ceil_mode": True}, True, False, "max_pool_backward"),
    "25 taps": (5, {"stride": 2}, False, True, "max_pool_backward"),
    "26 taps": ((2, 13), {"stride": 2}, False, True, "max_pool_backward_looped"),
    "stride of 5": (3, {"stride": (5, 1)}, True, True, "max_pool_backward_looped"),
}


@pytest.mark.parametrize("path", PATHS)
def test_paths(randn, triton, launches, path):
    """Which way each geometry takes, so that the others here are known to cover them all."""
    kernel, keywords, unrolled, inside, backward = PATHS[path]
    (input,) = leaves(randn(1, 2, 14, 15))
    ops.max_pool2d(input, kernel, **keywords).sum().backward()
    first, second = launches
    assert (first.constants["UNROLL"] > 1) == unrolled
    assert first.constants["INSIDE"] == inside
    assert second.kernel.__name__ == backward


@st.composite
def poolings(draw):
    def sides(least, most):
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    kernel, dilation = sides(1, 4), sides(1, 3)
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, s // 2)) for s in span)
    height, width = sides(1, 12)
    assume(height + 2 * padding[0] >= span[0])
    assume(width + 2 * padding[1] >= span[1])
    keywords = {
        "stride": sides(1, 4),
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
    }
    # a window with no tap inside the image has no place to report
    assume(dilation == (1, 1) or padding == (0, 0))
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 8])), height, width)
    place = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    return shape, *place, kernel, keywords


def check_pooling(randn, case):
    shape, dtype, layout, kernel, keywords = case
    # few distinct values, so that most windows hold a tie
    input = (randn(*shape, layout=layout) * 2).round().to(dtype)
    with alexkern.use_backend("triton"):
        check_pool(input, kernel, **keywords)


@given(poolings())
def test_any(randn, case):
    check_pooling(randn, case)


@pytest.mark.slow
@settings(max_examples=400)
@given(poolings())
def test_any_long(randn, case):
    check_pooling(randn, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_configurations(randn, triton, launches, dtype, layout):
    with shipped_configurations():
        check_pool(randn(2, 16, 21, 23, dtype=dtype, layout=layout), 3, stride=2)
    assert {made.constants["VECTOR"] for made in launches} == {8 if layout != "nchw" else 1}
    assert all(made.grid[0] > 1 for made in launches)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", ["paper", "padding", "26 taps"])
def test_the_grid_covers_the_image(randn, triton, launches, path, layout):
    """With no lane to spare: blocks of two vectors of 8 elements, or of 16 pixels."""
    kernel, keywords, *_ = PATHS[path]
    channels = 8 if layout == "channels_last" else 4
    with forced(PointwiseConfig(16, 1, 4)):
        check_pool(randn(1, channels, 6, 15, layout=layout), kernel, **keywords)
    assert all(made.grid[0] > 1 for made in launches[:2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_go_to_the_first(backend, device, layout):
    (input,) = leaves(torch.zeros(1, 2, 5, 5, device=device))
    image = input if layout == "nchw" else input.to(memory_format=torch.channels_last)
    output, indices = ops.max_pool2d(image, 3, 2, return_indices=True)
    output.sum().backward()
    expected = torch.zeros(5, 5, device=device)
    expected[0:3:2, 0:3:2] = 1
    assert torch.equal(input.grad[0, 1], expected)
    assert indices[0, 0].tolist() == [[0, 2], [10, 12]]


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(backend, device, dtype, kernel):
    """NaN wins (the last one), -inf loses, signs of zero are kept, all -inf gives the first."""
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-42, 1.0]
    generator = torch.Generator().manual_seed(1)
    choice = torch.randint(len(special), (4, 3, 9, 9), generator=generator)
    input = torch.tensor(special)[choice].to(device, dtype)
    input[0, 0] = -math.inf
    input[0, 1] = -0.0
    for padding in (0, 1):
        (ours,), (theirs,) = leaves(input), leaves(input)
        actual = ops.max_pool2d(ours, kernel, 2, padding, return_indices=True)
        expected = F.max_pool2d(theirs, kernel, 2, padding, return_indices=True)
        for a, e in zip(actual, expected, strict=True):
            check_same(a.detach(), e.detach())
        for output in (actual[0], expected[0]):
            output.backward(torch.ones_like(output))
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("extent", "arguments"),
    [
        (2, (2, 1, 1, 3)),
        (5, (16, 300, 8, 20, True)),  # 256 taps: no value of a byte is left for "none"
    ],
)
def test_a_window_outside_the_image_is_minus_infinity(triton, device, extent, arguments):
    """Dilation can step over a small image; PyTorch gives -inf there as well."""
    (input,) = leaves(torch.ones(1, 1, extent, extent, device=device))
    output = ops.max_pool2d(input, *arguments)
    assert output.tolist() == [[[[-math.inf]]]]
    check_same(output.detach(), F.max_pool2d(input.detach(), *arguments))
    output.sum().backward()
    assert not input.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_other_dtypes_run_the_reference(triton, dtype):
    input = torch.arange(50).view(1, 2, 5, 5).to(dtype)
    check_same(ops.max_pool2d(input, 3, 2), F.max_pool2d(input, 3, 2))


@pytest.mark.parametrize(("kernel", "size"), [(3, 1), (16, 1), (17, 4)])
def test_keeps_one_byte_per_output(randn, triton, kernel, size):
    (input,) = leaves(randn(1, 2, 18, 18))
    saved = []

    def note(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = ops.max_pool2d(input, kernel, 1)
    assert [(tensor.shape, tensor.element_size()) for tensor in saved] == [(output.shape, size)]


@pytest.mark.parametrize("kernel", [16, 17])
def test_the_last_of_many_taps(triton, device, kernel):
    """Taps 255 and 288 win everywhere: the codes' dtype must hold them."""
    check_pool(torch.arange(360.0, device=device).view(1, 1, 18, 20), kernel, stride=1)


def test_indices_have_no_gradient(randn, triton):
    (input,) = leaves(randn(1, 2, 5, 5))
    output, indices = ops.max_pool2d(input, 3, return_indices=True)
    assert output.requires_grad
    assert not indices.requires_grad


def test_indices_unpool(randn, triton):
    input = randn(1, 2, 6, 6)
    output, indices = ops.max_pool2d(input, 2, return_indices=True)
    restored = F.max_unpool2d(output, indices, 2)
    assert torch.equal(restored[restored != 0].sort()[0], output.flatten().sort()[0])


def test_autocast_keeps_the_dtype(randn, backend, device):
    with torch.autocast(device.type, torch.bfloat16):
        for dtype in DTYPES:
            assert ops.max_pool2d(randn(1, 2, 4, 4, dtype=dtype), 2).dtype == dtype


IMAGE = torch.ones(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((IMAGE, 0), "0"),
        ((IMAGE, -3), "-3"),
        ((IMAGE, 3, 0), "0"),
        ((IMAGE, 3, -1), "-1"),
        ((IMAGE, 3, 2, -1), "-1"),
        ((IMAGE, 3, 2, 2), "pad=2"),
        ((IMAGE, 3, 2, (1, 2)), "pad=2"),
        ((IMAGE, 2, 2, 2), "pad=2"),
        ((IMAGE, 3, 2, 0, 0), "0"),
        ((IMAGE, 9), "0"),
        ((IMAGE, 2, 1, 0, 8), "0"),
        ((IMAGE, (3, 3, 3)), "(3, 3, 3)"),
        ((IMAGE, 3, (1, 2, 3)), "(1, 2, 3)"),
        ((IMAGE, 2.5), "2.5"),
        ((IMAGE, "3"), "3"),
        ((IMAGE[0, 0], 3), "[8, 8]"),
        ((IMAGE[None], 3), "[1, 2, 3, 8, 8]"),
        ((IMAGE[:, :0], 3), "[2, 0, 8, 8]"),
        ((IMAGE[:, :, :0], 3), "[2, 3, 0, 8]"),
        ((IMAGE[0, :0], 3), "[0, 8, 8]"),
    ],
)
def test_refusals(arguments, named):
    check_refusal(F.max_pool2d, ops.max_pool2d, named, *arguments)


@pytest.mark.parametrize("stride", [None, (), []], ids=str)
def test_stride_defaults_to_the_kernel(randn, backend, stride):
    input = randn(1, 2, 7, 7)
    check_same(ops.max_pool2d(input, (2, 3), stride), F.max_pool2d(input, (2, 3)))
