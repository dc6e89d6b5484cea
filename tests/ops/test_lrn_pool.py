import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    LAYOUTS,
    check_lrn,
    check_lrn_pool,
    check_refusal,
    check_same,
    inside_nans,
    leaves,
    plain_lrn,
)

import alexkern
from alexkern import ops
from alexkern.runtime.config import shipped_configurations
from alexkern.runtime.launch import record_launches

PAPER = {"size": 5, "kernel_size": 3, "stride": 2, "alpha": 1e-4, "k": 2.0, "alpha_mode": "sum"}
# large enough for the window to matter
STRONG = {"size": 5, "alpha": 0.5}
FUSED = ["lrn_max_pool_forward", "lrn_max_pool_backward"]


def kernels(launches):
    return [made.kernel.__name__ for made in launches]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 27, 27), (2, 32, 13, 13)], ids=str)
def test_paper(randn, triton, launches, shape, dtype, layout):
    check_lrn_pool(randn(*shape, dtype=dtype, layout=layout) * 20, **PAPER)
    assert kernels(launches) == FUSED


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 55, 55), (1, 256, 27, 27)], ids=str)
def test_paper_in_full(randn, triton, shape, dtype, layout):
    check_lrn_pool((randn(*shape, dtype=dtype, layout=layout) * 20).relu(), **PAPER)


# kernel and stride that one pass takes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2), ((3, 2), (2, 1)), ((1, 4), (1, 4)), ((3, 1), (3, 1))],
)
def test_windows(randn, triton, launches, kernel, stride, layout):
    check_lrn_pool(randn(2, 16, 11, 8, layout=layout), **STRONG, kernel_size=kernel, stride=stride)
    assert kernels(launches) == FUSED


# and those that it does not, in either layout
@pytest.mark.parametrize(
    "pool",
    [
        {"kernel_size": 3, "stride": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (2, 1), "stride": (2, 2)},
        {"kernel_size": 3, "stride": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "dilation": 2},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 3},
    ],
    ids=str,
)
def test_other_windows_take_two_passes(randn, triton, launches, pool):
    input = randn(2, 8, 8, 10, layout="channels_last")
    output = ops.lrn_max_pool2d(input, **STRONG, **pool)
    assert kernels(launches) == ["lrn_forward", "max_pool_forward"]
    check_same(output, ops.max_pool2d(ops.local_response_norm(input, **STRONG), **pool))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 11, 40])
@pytest.mark.parametrize("channels", [7, 16, 24])
def test_sizes(randn, triton, channels, size, layout):
    input = randn(1, channels, 5, 7, layout=layout)
    check_lrn_pool(input, **{**STRONG, "size": size}, kernel_size=3, stride=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_and_alpha_mode(randn, backend, groups, layout):
    for alpha_mode in ("mean", "sum"):
        norm = {**STRONG, "alpha_mode": alpha_mode, "groups": groups}
        check_lrn_pool(randn(2, 24, 5, 5, layout=layout), **norm, kernel_size=3, stride=2)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.75, 0.6])
def test_powers(randn, triton, beta):
    check_lrn_pool(randn(1, 11, 5, 5), **STRONG, beta=beta, kernel_size=3, stride=2)


@st.composite
def tails(draw):
    groups = draw(st.integers(1, 2))
    stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    kernel = tuple(draw(st.integers(step, 2 * step)) for step in stride)
    spatial = [draw(st.integers(extent, 9)) for extent in kernel]
    channels = groups * draw(st.sampled_from([1, 3, 8, 13, 16]))
    shape = (draw(st.integers(1, 3)), channels, *spatial)
    arguments = {
        "size": draw(st.integers(1, 9)),
        "kernel_size": kernel,
        "stride": stride,
        "alpha": draw(st.floats(0.1, 2)),
        "k": draw(st.floats(0.5, 3)),
        "groups": groups,
    }
    return shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)), arguments


def check_tail(randn, case):
    shape, dtype, layout, arguments = case
    with alexkern.use_backend("triton"):
        check_lrn_pool(randn(*shape, dtype=dtype, layout=layout), **arguments)


@given(tails())
def test_any(randn, case):
    check_tail(randn, case)


@pytest.mark.slow
@settings(max_examples=300)
@given(tails())
def test_any_long(randn, case):
    check_tail(randn, case)


@pytest.mark.parametrize("layout", ["channels_last", pytest.param("nchw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_configurations(randn, triton, launches, dtype, layout):
    """Several programs along positions and output rows, and several chunks in each of them."""
    input = randn(5, 32, 23, 17, dtype=dtype, layout=layout)
    with shipped_configurations():
        check_lrn_pool(input, **STRONG, kernel_size=3, stride=2)
    forward, backward = launches
    chunks = 4 if layout == "channels_last" else 1
    assert {made.constants["CHUNKS_PER_PROGRAM"] for made in launches} == {chunks}
    assert forward.grid[0] > 1
    assert forward.grid[1] > 1
    assert backward.grid[0] > 4 // chunks
    assert {made.constants["PACKED"] for made in launches} == {layout == "channels_last"}


@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_packed_kernels_stay_inside(randn, triton, guard_bands, launches, offset, shipped):
    """With 16-byte accesses, and where an odd address forbids them: among NaNs, and guarded."""
    input = inside_nans(randn(2, 16, 7, 5, layout="channels_last"), offset)
    with shipped_configurations() if shipped else nullcontext():
        check_lrn(input, 5, 0.5)
        check_lrn_pool(input, **STRONG, kernel_size=3, stride=2)
    assert {made.constants["PACKED"] for made in launches} == {True}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties(triton, device, layout):
    """The first maximum in row-major order gets the gradient, also among zeros (after a ReLU)."""
    for value in (0.0, 1.5):
        input = torch.full((1, 16, 7, 7), value, device=device)
        if layout == "channels_last":
            input = input.to(memory_format=torch.channels_last)
        (ours,) = leaves(input)
        upstream = torch.ones(1, 16, 3, 3, device=device)
        ops.lrn_max_pool2d(ours, 1, 3, 2, alpha=0.0).backward(upstream)
        (theirs,) = leaves(input)
        F.max_pool2d(theirs, 3, 2).backward(upstream)
        check_same(ours.grad, theirs.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("places", [[4], [1, 7], [0, 8], list(range(9))])
def test_nan_and_infinity(triton, device, places, layout):
    """The last NaN of a window wins, and an infinity (which becomes NaN) like one."""
    for value in (math.nan, math.inf, -math.inf):
        input = torch.rand(1, 16, 5, 5, device=device)
        for place in places:
            input[0, 3, place // 3, place % 3] = value
        if layout == "channels_last":
            input = input.to(memory_format=torch.channels_last)
        (ours,), (theirs,) = leaves(input), leaves(input.double())
        output = ops.lrn_max_pool2d(ours, 5, 3, 2, alpha=0.5)
        expected = F.max_pool2d(F.local_response_norm(theirs, 5, 0.5), 3, 2)
        torch.testing.assert_close(output.double(), expected, equal_nan=True, rtol=1e-5, atol=0)
        output.sum().backward()
        expected.sum().backward()
        assert torch.equal(ours.grad.isnan(), theirs.grad.isnan())


def test_unbatched(randn, backend):
    input = randn(16, 7, 9)
    output = ops.lrn_max_pool2d(input, **STRONG, kernel_size=3, stride=2)
    check_same(output, ops.lrn_max_pool2d(input[None], **STRONG, kernel_size=3, stride=2)[0])


def test_half_does_not_round_in_between(triton, device):
    """In bfloat16 both values of a window round to 1; the larger of the two is the second."""
    input = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16, device=device)
    input = input.view(1, 1, 1, 2).requires_grad_()
    ops.lrn_max_pool2d(input, 1, (1, 2), alpha=0.4921875, beta=1.0).backward(
        torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device=device)
    )
    truth = plain_lrn(input.detach().double(), 1, 0.4921875, 1.0)
    assert truth.bfloat16()[..., 0].item() == truth.bfloat16()[..., 1].item()
    assert (input.grad.flatten() != 0).tolist() == (truth == truth.max()).flatten().tolist()


def saved_bytes(op):
    """Bytes of what the tails of AlexNet's layers 1 and 2 keep, and of their inputs."""
    kept, inputs = {}, 0

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    for shape in ((128, 96, 55, 55), (128, 256, 27, 27)):
        input = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        inputs += input.untyped_storage().nbytes()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op(input.to(memory_format=torch.channels_last))
    return sum(storage.nbytes() for storage in kept.values()), inputs


def test_memory_saved_for_backward(triton):
    """A byte per output beside the input: (2 + 1 / 4.15) / 2 and (2 + 1 / 4.31) / 2 of it."""
    with record_launches():
        ours, inputs = saved_bytes(lambda x: ops.lrn_max_pool2d(x, **PAPER))
    eager, _ = saved_bytes(lambda x: F.max_pool2d(F.local_response_norm(x, 5, 5e-4, 0.75, 2), 3, 2))
    assert 1.11 < ours / inputs < 1.13
    assert eager / inputs > 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(2, 4, 2, 2), 5, 3), "Output size is too small"),
        ((torch.ones(2, 4, 5, 5), 5, 3, 0), "stride"),
        ((torch.ones(2, 4, 5, 5), 5, 3, 2, 2), "pad=2"),
        ((torch.ones(2, 4, 5, 5), 5, 2.5), "2.5"),
        ((torch.ones(2, 4, 5, 5), 0, 3), "0"),
        ((torch.ones(2, 4, 5, 5), 1.5, 3), "1.5"),
        ((torch.ones(2, 4, 5, 5, 5), 5, 3), "[2, 4, 5, 5, 5]"),
    ],
)
def test_refusals_of_pytorch(arguments, named):
    def theirs(input, size, *pool):
        return F.max_pool2d(F.local_response_norm(input, size), *pool)

    check_refusal(theirs, ops.lrn_max_pool2d, named, *arguments)


@pytest.mark.parametrize("keywords", [{"alpha_mode": "max"}, {"groups": 3}, {"groups": 0}])
def test_refusals_of_our_own(backend, keywords):
    with pytest.raises(ValueError, match=f"{next(iter(keywords.values()))}"):
        ops.lrn_max_pool2d(torch.ones(2, 4, 5, 5), 5, 3, 2, **keywords)
