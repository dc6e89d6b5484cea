"""Every variant of the vendor's convolution against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, check_format

from alexkern.runtime import vendor

# input, weight, (stride, padding as left, right, top, bottom, dilation, groups)
CASES = {
    "plain": ((2, 3, 6, 7), (4, 3, 3, 3), ((1, 1), (1, 1, 1, 1), (1, 1), 1)),
    "groups": ((2, 6, 9, 8), (9, 2, 3, 2), ((2, 3), (1, 1, 2, 2), (1, 2), 3)),
    "four sides": ((2, 4, 7, 6), (6, 2, 3, 3), ((2, 2), (0, 3, 1, 2), (1, 1), 2)),
}


def laid_out(tensor, layout):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if layout != "nchw" else tensor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", vendor.VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_all_passes(randn, case, variant, layout):
    input_shape, weight_shape, extents = CASES[case]
    stride, padding, dilation, groups = extents
    input, weight = (laid_out(randn(*s).double(), layout) for s in (input_shape, weight_shape))
    x, w = input.clone().requires_grad_(), weight.clone().requires_grad_()
    truth = F.conv2d(F.pad(x, padding), w, None, stride, 0, dilation, groups)
    upstream = laid_out(randn(*truth.shape, seed=1).double(), layout)
    truths = (truth, *torch.autograd.grad(truth, (x, w), upstream))
    given = (
        vendor.convolve(input, weight, extents, variant),
        vendor.input_grad(upstream, weight, input_shape, extents, variant),
        vendor.weight_grad(upstream, input, weight, extents, variant),
    )
    for actual, expected in zip(given, truths, strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)
    check_format(given[0], input)
    check_format(given[2], weight)


@pytest.mark.parametrize("variant", vendor.VARIANTS)
def test_one_pixel_that_could_be_of_either_format_is_contiguous(randn, variant):
    """As everywhere here; padding must not make up its mind otherwise."""
    input = randn(16).as_strided((2, 8, 1, 1), (8, 1, 8, 8))
    extents = (1, 1), (1, 2, 1, 2), (1, 1), 1
    output = vendor.convolve(input, randn(4, 8, 2, 2), extents, variant)
    assert output.is_contiguous()


def test_unknown_variant(randn):
    with pytest.raises(ValueError, match="nhwc"):
        vendor.convolve(randn(1, 1, 1, 1), randn(1, 1, 1, 1), CASES["plain"][2], "nhwc")
