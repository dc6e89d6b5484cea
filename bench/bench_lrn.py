"""local_response_norm on the paper's two layers, with the paper's constants."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import alexkern.ops as ops
from bench import compare
from bench.layers import BATCH, NORMALISED, POOLS


@compare.variants
@compare.directions
@pytest.mark.parametrize("layer", NORMALISED)
def test_local_response_norm(
    benchmark: Any, gpu: torch.device, layer: str, direction: str, variant: str
) -> None:
    image = torch.randn(BATCH, *POOLS[layer], dtype=torch.bfloat16, device=gpu).relu()
    compare.run(
        benchmark,
        variant,
        direction,
        lambda x: ops.local_response_norm(x, 5, 1e-4, 0.75, 2.0, "sum"),
        lambda x: F.local_response_norm(x, 5, 5e-4, 0.75, 2.0),  # PyTorch divides alpha by size
        image.requires_grad_(),
    )
