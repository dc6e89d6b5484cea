"""conv2d_bias_relu on the paper's five layers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import alexkern.ops as ops
from bench import compare
from bench.layers import BATCH, CONVOLUTIONS


@compare.variants
@compare.directions
@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_conv2d_bias_relu(
    benchmark: Any, gpu: torch.device, layer: str, direction: str, variant: str
) -> None:
    shape, channels, kernel, stride, padding, groups = CONVOLUTIONS[layer]
    image = torch.randn(BATCH, *shape, dtype=torch.bfloat16, device=gpu)
    fan_in = shape[0] // groups * kernel * kernel
    weight = torch.randn(channels, shape[0] // groups, kernel, kernel, device=gpu) / fan_in**0.5
    bias = torch.randn(channels, dtype=torch.bfloat16, device=gpu)
    symmetric = padding if isinstance(padding, int) else 0

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ops.conv2d_bias_relu(x, w, b, stride, padding, 1, groups)

    def theirs(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not symmetric:
            x = F.pad(x, padding)
        return F.conv2d(x, w, b, stride, symmetric, 1, groups).relu()

    image.requires_grad_(layer != "conv1")
    weight = weight.bfloat16().requires_grad_()
    compare.run(benchmark, variant, direction, ours, theirs, image, weight, bias.requires_grad_())
