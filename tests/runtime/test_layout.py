import pytest
import torch

from alexkern.runtime.layout import (
    convolution_fp32_precision,
    dense,
    dense_as,
    is_channels_last,
    outer_channels_inner,
)

LAST = torch.channels_last


@pytest.mark.parametrize(
    ("tensor", "last", "triple"),
    [
        (torch.zeros(2, 3, 4, 5), False, (2, 3, 20)),
        (torch.zeros(2, 3, 4, 5).to(memory_format=LAST), True, (40, 3, 1)),
        (torch.zeros(2, 1, 4, 5).to(memory_format=LAST), False, (2, 1, 20)),
        (torch.zeros(2, 3, 1, 1).to(memory_format=LAST), False, (2, 3, 1)),
        (torch.zeros(2, 7, 3).mT, True, (14, 3, 1)),
        (torch.zeros(2, 4, 5, 6, 3).movedim(-1, 1), True, (240, 3, 1)),
    ],
)
def test_dense_layouts(tensor, last, triple):
    assert is_channels_last(tensor) == last
    assert outer_channels_inner(tensor) == triple
    assert dense(tensor) is tensor
    assert dense_as(tensor, last).data_ptr() == tensor.data_ptr()
    other = dense_as(tensor, not last)
    assert torch.equal(other, tensor)
    assert is_channels_last(other) != last or 1 in (tensor.shape[1], tensor[0, 0].numel())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(120.0).view(2, 3, 4, 5).mT,
        torch.arange(120.0).view(2, 3, 4, 5)[:, ::2],
        torch.arange(5.0).expand(2, 3, 4, 5),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0)[::2],
    ],
)
def test_other_strides_get_one_copy(tensor):
    copy = dense(tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() != tensor.data_ptr()
    assert torch.equal(copy, tensor)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_is_torchs_current_switch(precision):
    torch.backends.cudnn.conv.fp32_precision = precision
    assert convolution_fp32_precision() == precision
