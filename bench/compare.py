"""One op in four variants: alexkern, eager PyTorch in NCHW and channels_last, torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alexkern import use_backend

VARIANTS = ("alexkern", "eager_nchw", "eager_channels_last", "compile")
DIRECTIONS = ("forward", "backward")

variants = pytest.mark.parametrize("variant", VARIANTS)
directions = pytest.mark.parametrize("direction", DIRECTIONS)


def run(
    benchmark: Any,
    variant: str,
    direction: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *operands: Tensor,
) -> None:
    """Time one direction of one variant on the operands, after checking its result.

    Args:
        benchmark: pytest-benchmark's fixture.
        variant: one of VARIANTS; ``ours`` runs on channels_last operands.
        direction: ``"forward"`` without autograd, or ``"backward"``: the gradients of all
            operands that require them, from a stored forward.
        ours: the op of this library.
        theirs: the same from torch.nn.functional.
        operands: on a GPU; the 4-D ones are put into the variant's memory format.
    """
    torch.compiler.reset()
    call = {"alexkern": ours, "compile": torch.compile(theirs)}.get(variant, theirs)
    nchw = variant == "eager_nchw"
    layout = torch.contiguous_format if nchw else torch.channels_last
    leaves = [
        operand.detach()
        .to(memory_format=layout if operand.dim() == 4 else torch.preserve_format)
        .requires_grad_(operand.requires_grad)
        for operand in operands
    ]
    with use_backend("triton"):
        if direction == "forward":
            with torch.no_grad():
                _check(call(*leaves), theirs, leaves)
                benchmark(_synchronised, lambda: call(*leaves))
            return
        output = call(*leaves)
        _check(output.detach(), theirs, leaves)
        grad = torch.randn_like(output)
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        benchmark(
            _synchronised,
            lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True),
        )


def _synchronised(call: Callable[[], Any]) -> None:
    call()
    torch.cuda.synchronize()


def _check(output: Tensor, theirs: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Refuse to time a result that is further off than the dtype's rounding explains."""
    with torch.no_grad():
        truth = theirs(*(leaf.detach().double() for leaf in leaves))
    error = (output.double() - truth).abs().max() / truth.abs().max()
    bound = 4 * torch.finfo(output.dtype).eps
    assert error <= bound, f"relative error {error:.1e} exceeds {bound:.1e}"
