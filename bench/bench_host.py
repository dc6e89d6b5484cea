"""What a call costs on the host before its kernel starts, measured on any machine.

Meta tensors run the whole path (checks, layout, autograd, block sizes, allocation) and the
launches are recorded instead of made; Triton's own launcher comes on top on a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import alexkern.ops as ops
from alexkern import use_backend
from alexkern.runtime.launch import record_launches


class _Identity(torch.autograd.Function):
    """The least that an op with a backward can cost."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def _image() -> Tensor:
    return torch.empty(128, 96, 27, 27, device="meta", requires_grad=True)


_SEED = torch.zeros((), dtype=torch.int64, device="meta")

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "autograd.Function": lambda x, w: _Identity.apply(x),
    "conv2d_bias_relu": lambda x, w: ops.conv2d_bias_relu(x, w, None, 1, 2, 1, 2),
    "local_response_norm": lambda x, w: ops.local_response_norm(x, 5),
    "max_pool2d": lambda x, w: ops.max_pool2d(x, 3, 2),
    "dropout": lambda x, w: ops.dropout(x, seed=_SEED),
}


@pytest.mark.parametrize("call", CALLS)
def test_host_overhead(benchmark: Any, call: str) -> None:
    image = _image()
    weight = torch.empty(256, 48, 5, 5, device="meta", requires_grad=True)
    with use_backend("triton"), record_launches() as launches:
        CALLS[call](image, weight)
        assert bool(launches) == (call in ops.__all__)

        def once() -> None:
            launches.clear()
            CALLS[call](image, weight)

        benchmark(once)
