import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    LAYOUTS,
    check_lrn,
    check_refusal,
    check_same,
    leaves,
    plain_lrn,
)

import alexkern
from alexkern import ops
from alexkern.runtime.config import shipped_configurations

PAPER = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0, "alpha_mode": "sum"}
# large enough for the window to matter
STRONG = {"size": 5, "alpha": 0.5, "beta": 0.75, "k": 1.0}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 55, 55), (1, 256, 27, 27)], ids=str)
def test_paper(randn, triton, shape, dtype, layout):
    check_lrn(randn(*shape, dtype=dtype, layout=layout) * 20, **PAPER)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 7, 8, 12, 13, 14, 30])
def test_sizes(randn, backend, size, layout):
    """Odd, even (whose backward window is mirrored), and beyond the 7 channels."""
    check_lrn(randn(2, 7, 3, 5, layout=layout), **{**STRONG, "size": size})


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 0.6, 3.3])
def test_powers(randn, backend, beta):
    check_lrn(randn(2, 11, 4, 3), **{**STRONG, "beta": beta})


@pytest.mark.parametrize("alpha_mode", ["mean", "sum"])
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_groups_and_alpha_mode(randn, backend, groups, alpha_mode):
    for size in (3, 4):
        arguments = {**STRONG, "size": size, "alpha_mode": alpha_mode, "groups": groups}
        check_lrn(randn(2, 12, 3, 3), **arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 5, 7), (3, 1, 4, 4), (1, 4, 1, 1), (2, 3, 2, 5, 3), (2, 8, 1), (1, 2, 1, 2, 1)]
)
def test_shapes(randn, backend, shape, layout):
    for dtype in DTYPES:
        check_lrn(randn(*shape, dtype=dtype, layout=layout), **STRONG)


def test_formula(triton, device):
    """Written out for one pixel, independently of PyTorch (paper section 3.3)."""
    values = [1.0, -2.0, 3.0, 0.5, 4.0]
    output = ops.local_response_norm(
        torch.tensor(values, device=device).view(1, 5, 1), 3, 0.1, 0.75, 2.0, "sum"
    )
    for c, value in enumerate(values):
        square_sum = sum(v * v for v in values[max(0, c - 1) : c + 2])
        assert output[0, c, 0].item() == pytest.approx(value / (2 + 0.1 * square_sum) ** 0.75)


@st.composite
def normalisations(draw):
    groups = draw(st.integers(1, 3))
    shape = (
        draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 5)),
        *draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)),
    )
    arguments = {
        "size": draw(st.integers(1, 8)),
        "alpha": draw(st.floats(0, 2)),
        "beta": draw(st.sampled_from([0.5, 0.75, 1.0, 0.6])),
        "k": draw(st.floats(0.5, 3)),
        "alpha_mode": draw(st.sampled_from(["mean", "sum"])),
        "groups": groups,
    }
    return shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)), arguments


def check_normalisation(randn, case):
    shape, dtype, layout, arguments = case
    with alexkern.use_backend("triton"):
        check_lrn(randn(*shape, dtype=dtype, layout=layout), **arguments)


@given(normalisations())
def test_any(randn, case):
    check_normalisation(randn, case)


@pytest.mark.slow
@settings(max_examples=400)
@given(normalisations())
def test_any_long(randn, case):
    check_normalisation(randn, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_configurations(randn, triton, launches, dtype, layout):
    with shipped_configurations():
        check_lrn(randn(2, 13, 9, 11, dtype=dtype, layout=layout), **STRONG)
        check_lrn(randn(2, 16, 9, 11, dtype=dtype, layout=layout), **STRONG)
    vectors = {False} if layout == "nchw" else {False, True}
    assert {made.constants["PACKED"] for made in launches} == vectors
    assert all(made.grid[0] > 1 for made in launches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_finite(randn, backend, layout):
    """NaN and infinities spread as far as the window reaches; huge values overflow alike."""
    for value in (math.nan, math.inf, -math.inf, 1e30, 0.0, -0.0, 1e-42):
        input = randn(2, 9, 2, 3, layout=layout)
        input[1, 4, 0, 1] = value
        output = ops.local_response_norm(input, **STRONG)
        expected = plain_lrn(input, **STRONG)
        assert torch.equal(output.isnan(), expected.isnan())
        torch.testing.assert_close(output, expected, equal_nan=True)
    zeros = torch.tensor([0.0, -0.0], device=input.device).view(1, 2, 1)
    check_same(ops.local_response_norm(zeros, 3), zeros)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_terms_that_cancel(randn, triton, dtype):
    """For equal values, a window over all of them and beta 1/2, dx is k / d of its two terms.

    The terms must stay in float32 until they have been subtracted.
    """
    input = torch.full_like(randn(1, 8, 2, 2, dtype=dtype), 8.0)
    keywords = {"size": 16, "alpha": 3.0, "beta": 0.5, "k": 1.0, "alpha_mode": "sum"}
    check_lrn(input, **keywords, upstream=torch.ones_like(input))


@pytest.mark.parametrize("beta", [0.75, 1.0])
@pytest.mark.parametrize(("k", "alpha"), [(0.0, 0.5), (5.0, -0.5)])
def test_denominators_that_are_not_positive(triton, device, k, alpha, beta):
    """Finite gradients beside them stay finite, as in PyTorch."""
    values = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 9.0], device=device)
    ours, theirs = leaves(values.view(1, 9, 1), values.view(1, 9, 1).double())
    for input, op in ((ours, ops.local_response_norm), (theirs, F.local_response_norm)):
        op(input, 5, alpha, beta, k).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, equal_nan=True, rtol=1e-4, atol=0)


def test_half_does_not_overflow_inside(triton, device):
    """The square of 300 is beyond float16, the result is not."""
    input = torch.full((1, 3, 2), 300.0, dtype=torch.float16, device=device)
    output = ops.local_response_norm(input, **PAPER)
    expected = plain_lrn(input.double(), **PAPER)
    torch.testing.assert_close(output.double(), expected, rtol=2**-11, atol=0)


def test_empty(backend, device):
    for shape in [(0, 3, 4, 4), (2, 0, 4), (2, 3, 0)]:
        (input,) = leaves(torch.empty(shape, device=device))
        output = ops.local_response_norm(input, 3)
        assert output.shape == shape
        output.sum().backward()
        assert input.grad.shape == shape


def test_integers_and_float64_run_the_reference(triton, device):
    double = torch.rand(1, 4, 2, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        ops.local_response_norm(double, **STRONG), plain_lrn(double, **STRONG)
    )
    assert ops.local_response_norm(torch.ones(1, 4, 2).long(), 3).dtype == torch.float32


def test_autocast_keeps_the_dtype(randn, backend, device):
    with torch.autocast(device.type, torch.bfloat16):
        for dtype in DTYPES:
            assert ops.local_response_norm(randn(1, 3, 2, dtype=dtype), 3).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(2, 3), 3), "2 dimensions"),
        ((torch.ones(3), 3), "1 dimensions"),
        ((torch.ones(2, 3, 4), 0), "0"),
        ((torch.ones(2, 3, 4), -2), "-2"),
        ((torch.ones(2, 3, 4), 1.5), "1.5"),
    ],
)
def test_refusals_of_pytorch(arguments, named):
    check_refusal(F.local_response_norm, ops.local_response_norm, named, *arguments)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"alpha_mode": "max"}, "'mean' or 'sum', got 'max'"),
        ({"groups": 2}, "3 channels, got groups=2"),
        ({"groups": 0}, "got groups=0"),
        ({"groups": -1}, "got groups=-1"),
    ],
)
def test_refusals_of_our_own(backend, keywords, message):
    with pytest.raises(ValueError, match=message):
        ops.local_response_norm(torch.ones(2, 3, 4), 3, **keywords)
