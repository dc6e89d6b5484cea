"""max_pool2d on the paper's three layers: 3x3 windows, stride 2."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import alexkern.ops as ops
from bench import compare
from bench.layers import BATCH, POOLS


@compare.variants
@compare.directions
@pytest.mark.parametrize("layer", POOLS)
def test_max_pool2d(
    benchmark: Any, gpu: torch.device, layer: str, direction: str, variant: str
) -> None:
    image = torch.randn(BATCH, *POOLS[layer], dtype=torch.bfloat16, device=gpu).relu()
    compare.run(
        benchmark,
        variant,
        direction,
        lambda x: ops.max_pool2d(x, 3, 2),
        lambda x: F.max_pool2d(x, 3, 2),
        image.requires_grad_(),
    )
