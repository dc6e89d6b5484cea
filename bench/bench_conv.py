"""conv2d_bias_relu on the paper's five layers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from bench import work
from bench.lab import Lab
from bench.layers import CONVOLUTIONS, Convolution, tiny_convolution
from bench.operation import VARIANTS as _VARIANTS
from bench.operation import Subject

# convolutions that a table of measurements may give to the vendor, pass by pass
VARIANTS = (*_VARIANTS, "alexkern_auto")


def subject(name: str, trial: bool = False) -> Subject:
    """The layer of that name, or a small one of its kind."""
    layer = CONVOLUTIONS[name]
    if trial:
        layer = tiny_convolution(layer)
    return Subject(
        "conv2d_bias_relu",
        name,
        partial(_ours, layer),
        lambda *tensors: _convolution(layer, *tensors).relu(),
        partial(_operands, layer),
        partial(work.convolution, layer),
        before_relu=partial(_convolution, layer),
    )


def _ours(layer: Convolution, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ops.conv2d_bias_relu(x, w, b, layer.stride, layer.padding, 1, layer.groups)


def _convolution(layer: Convolution, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    padding = layer.padding
    if not isinstance(padding, int):  # padding with four sides is an op of its own
        x, padding = F.pad(x, padding), 0
    return F.conv2d(x, w, b, layer.stride, padding, 1, layer.groups)


def _operands(layer: Convolution, batch: int, randn: Callable[..., Tensor]) -> list[Tensor]:
    kernel, fan_in = layer.kernel, layer.group_in * layer.kernel**2
    image = randn(batch, *layer.shape)
    weight = randn(layer.channels, layer.group_in, kernel, kernel) / fan_in**0.5
    bias = randn(layer.channels)
    image.requires_grad_(layer.shape[0] > 3)  # the first layer learns no image
    return [image, weight.requires_grad_(), bias.requires_grad_()]


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_conv2d_bias_relu(compare_op: Callable[[Subject], None], lab: Lab, layer: str) -> None:
    compare_op(subject(layer, lab.trial))
