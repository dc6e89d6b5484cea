"""What a call costs on the host.

Before its kernel starts, on any machine: meta tensors run the whole path (checks, layout,
autograd, block sizes, allocation) and the launches are recorded instead of made. On a GPU also
the whole call, Triton's own launcher included, beside PyTorch's; on one image, so that the GPU
is never what the host waits for.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from alexkern import use_backend
from alexkern.ops import lrn
from alexkern.runtime.launch import record_launches
from bench.conftest import NO_GPU, Keep
from bench.record import Key

VARIANTS, FULL_VARIANTS = ("alexkern", "eager", "compile"), ()


class _Bare(torch.autograd.Function):
    """What `local_response_norm` runs behind its checks, as an autograd function and no more."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *numbers: float) -> Tensor:
        ctx.save_for_backward(input)
        ctx.numbers = numbers
        return lrn.normalise(input, *numbers)


class _Identity(torch.autograd.Function):
    """The least that an op with a backward can cost."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)


_SEED = torch.zeros((), dtype=torch.int64, device="meta")
_IMAGES = torch.empty(128, 256, 256, 3, dtype=torch.uint8, device="meta")
_CORNERS = torch.empty(128, 2, dtype=torch.int64, device="meta")
_FLIPS = torch.empty(128, dtype=torch.bool, device="meta")
_MEAN = torch.empty(224, 224, 3, device="meta")

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "autograd.Function": lambda x, w: _Identity.apply(x),
    "local_response_norm, bare": lambda x, w: _Bare.apply(x, 5, 1e-4 / 5, 0.75, 1.0, 1),
    "conv2d_bias_relu": lambda x, w: ops.conv2d_bias_relu(x, w, None, 1, 2, 1, 2),
    "local_response_norm": lambda x, w: ops.local_response_norm(x, 5),
    "max_pool2d": lambda x, w: ops.max_pool2d(x, 3, 2),
    "lrn_max_pool2d": lambda x, w: ops.lrn_max_pool2d(x, 5, 3, 2),
    "dropout": lambda x, w: ops.dropout(x, seed=None if x.is_cuda else _SEED),
    "linear_bias_relu_dropout": lambda x, w: ops.linear_bias_relu_dropout(
        x.view(-1, 48), w.view(-1, 48), seed=None if x.is_cuda else _SEED
    ),
    "augment": lambda x, w: ops.augment(_IMAGES, _CORNERS, _FLIPS, _MEAN),
}
THEIRS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "conv2d_bias_relu": lambda x, w: F.conv2d(x, w, None, 1, 2, 1, 2).relu(),
    "local_response_norm": lambda x, w: F.local_response_norm(x, 5),
    "max_pool2d": lambda x, w: F.max_pool2d(x, 3, 2),
    "lrn_max_pool2d": lambda x, w: F.max_pool2d(F.local_response_norm(x, 5), 3, 2),
    "dropout": lambda x, w: F.dropout(x),
    "linear_bias_relu_dropout": lambda x, w: F.dropout(
        F.linear(x.view(-1, 48), w.view(-1, 48)).relu()
    ),
}


def _operands(device: str, images: int) -> tuple[Tensor, Tensor]:
    image = torch.empty(images, 96, 27, 27, device=device, requires_grad=True)
    return image, torch.empty(256, 48, 5, 5, device=device, requires_grad=True)


@pytest.mark.parametrize("call", CALLS)
def test_host_overhead(benchmark: Any, call: str) -> None:
    image, weight = _operands("meta", 128)
    with use_backend("triton"), record_launches() as launches:
        CALLS[call](image, weight)
        assert bool(launches) == (call != "autograd.Function")

        def once() -> None:
            launches.clear()
            CALLS[call](image, weight)

        benchmark(once)


@pytest.mark.parametrize("call", THEIRS)
def test_host_call(benchmark: Any, keep: Keep, call: str, variant: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    torch.compiler.reset()
    compiled = torch.compile(THEIRS[call], dynamic=False)
    function = {"alexkern": CALLS[call], "eager": THEIRS[call], "compile": compiled}[variant]
    image, weight = _operands("cuda", 1)
    with use_backend("triton"):
        function(image, weight)
        torch.cuda.synchronize()
        benchmark.pedantic(function, setup=lambda: _idle(image, weight), rounds=200)
    keep(Key("host", call, "one image", "forward", "fp32", 1, variant))


def _idle(*operands: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The arguments of the next call, once the GPU has nothing left to do."""
    torch.cuda.synchronize()
    return operands, {}
