"""dropout on the paper's two fully connected layers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import alexkern.ops as ops
from bench.layers import BATCH, DROPOUTS


@pytest.mark.parametrize("variant", ["alexkern", "eager", "compile"])
@pytest.mark.parametrize("layer", DROPOUTS)
def test_dropout(benchmark: Any, gpu: torch.device, layer: str, variant: str) -> None:
    units = torch.randn(BATCH, *DROPOUTS[layer], dtype=torch.bfloat16, device=gpu)
    grad = torch.randn_like(units)
    units.requires_grad_()
    call = {
        "alexkern": ops.dropout,
        "eager": F.dropout,
        "compile": torch.compile(F.dropout),
    }[variant]

    def step() -> torch.Tensor:
        output = call(units, 0.5)
        output.backward(grad)
        torch.cuda.synchronize()
        return output

    kept = step().count_nonzero().item() / units.numel()
    assert abs(kept - 0.5) < 5 * 0.5 / units.numel() ** 0.5, f"kept {kept:.4f}, expected 0.5"
    benchmark(step)
