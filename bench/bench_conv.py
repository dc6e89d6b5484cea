"""conv2d_bias_relu on the paper's five layers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from bench import work
from bench.lab import Lab
from bench.layers import CONVOLUTIONS, Layer, tiny
from bench.operation import Subject


def subject(name: str, trial: bool = False) -> Subject:
    """The layer of that name, or a small one of its kind."""
    shape, channels, *geometry = CONVOLUTIONS[name]
    layer = (tiny(shape), channels // 4, *geometry) if trial else CONVOLUTIONS[name]
    return Subject(
        "conv2d_bias_relu",
        name,
        partial(_ours, layer),
        lambda *tensors: _convolution(layer, *tensors).relu(),
        partial(_operands, layer),
        partial(work.convolution, layer),
        before_relu=partial(_convolution, layer),
    )


def _ours(layer: Layer, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    _, _, _, stride, padding, groups = layer
    return ops.conv2d_bias_relu(x, w, b, stride, padding, 1, groups)


def _convolution(layer: Layer, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    _, _, _, stride, padding, groups = layer
    if not isinstance(padding, int):  # padding with four sides is an op of its own
        x, padding = F.pad(x, padding), 0
    return F.conv2d(x, w, b, stride, padding, 1, groups)


def _operands(layer: Layer, batch: int, randn: Callable[..., Tensor]) -> list[Tensor]:
    shape, channels, kernel, _, _, groups = layer
    group_in = shape[0] // groups
    weight = randn(channels, group_in, kernel, kernel) / (group_in * kernel * kernel) ** 0.5
    image = randn(batch, *shape).requires_grad_(shape[0] > 3)  # the first layer learns no image
    return [image, weight.requires_grad_(), randn(channels).requires_grad_()]


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_conv2d_bias_relu(compare_op: Callable[[Subject], None], lab: Lab, layer: str) -> None:
    compare_op(subject(layer, lab.trial))
