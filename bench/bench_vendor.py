"""What cuDNN does with the paper's convolutions: `pytest bench/ --vendor`.

Every pass and layout. A grouped convolution is measured as such, and as one plain convolution per
group on contiguous halves. The kernels' names go into the record. Bias and ReLU are left out.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexkern.runtime.timing import Call, operand_sets
from alexkern.runtime.vendor import without_cudnn
from bench import work
from bench.conftest import Compare
from bench.lab import Lab, Variant
from bench.layers import CONVOLUTIONS, Convolution, tiny_convolution
from bench.machine import DTYPES
from bench.record import Key

DIRECTIONS = ("forward", "input_grad", "weight_grad")
VARIANTS = ("nchw", "channels_last", "nchw_split", "channels_last_split")
FULL_VARIANTS = ()

# Rounding of a factor of each product, relative
_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-11, "fp32": 2.0**-24}


class _Pass:
    """One pass of one layer on given operands, in one layout, grouped or split."""

    def __init__(
        self, layer: Convolution, direction: str, tensors: list[Tensor], split: bool
    ) -> None:
        parts = layer.groups if split else 1
        image, weight, grad = tensors
        self._parts = list(
            zip(
                _halves(image, 1, parts),
                _halves(weight, 0, parts),
                _halves(grad, 1, parts),
                strict=True,
            )
        )
        self._direction = direction
        padding = layer.padding if isinstance(layer.padding, int) else 0  # others come padded
        groups = layer.groups // parts
        self._geometry = [layer.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups

    def __call__(self) -> list[Tensor]:
        return [self._one(*part) for part in self._parts]

    def _one(self, image: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        if self._direction == "forward":
            output: Tensor = torch.ops.aten.convolution(image, weight, None, *self._geometry)
            return output
        wanted = [self._direction == "input_grad", self._direction == "weight_grad", False]
        gradients: list[Tensor] = torch.ops.aten.convolution_backward(
            grad, image, weight, None, *self._geometry, wanted
        )
        return gradients[wanted.index(True)]


def _halves(tensor: Tensor, dimension: int, parts: int) -> list[Tensor]:
    if parts == 1:
        return [tensor]
    layout = torch.channels_last if tensor.stride(1) == 1 else torch.contiguous_format
    return [part.clone(memory_format=layout) for part in tensor.chunk(parts, dimension)]


def _operands(layer: Convolution, batch: int, randn: Callable[..., Tensor]) -> list[Tensor]:
    """Image (padded where cuDNN cannot), weight and output gradient."""
    kernel, fan_in = layer.kernel, layer.group_in * layer.kernel**2
    image = randn(batch, *layer.shape)
    if not isinstance(layer.padding, int):
        image = F.pad(image, layer.padding)
    weight = randn(layer.channels, layer.group_in, kernel, kernel) / fan_in**0.5
    return [image, weight, randn(batch, layer.channels, *layer.output_size)]


def _variants(
    layer: Convolution, direction: str, batch: int, dtype: str, lab: Lab, parts: work.Work
) -> dict[str, Variant]:
    count = operand_sets(parts.bytes, lab.l2_bytes)
    randn = partial(torch.randn, device=lab.device, dtype=DTYPES[dtype])
    sets = [_operands(layer, batch, randn) for _ in range(count)]
    axis = 0 if direction == "weight_grad" else 1
    exact = _Pass(layer, direction, [tensor.double() for tensor in sets[0]], False)
    with without_cudnn():
        truth = exact()[0]
    length = parts.flops / (2 * truth.numel())  # of each sum

    def error_ratio(result: list[Tensor]) -> float:
        """RMS error, relative, over what rounding explains: to see that the call is right.

        16 roundings: cuDNN may choose a transformed algorithm, which loses some bits.
        """
        error = (torch.cat(result, axis).double() - truth).square().mean().sqrt()
        allowed = 16 * _ROUNDING[dtype] + length**0.5 * _ROUNDING["fp32"]
        return float(error / (allowed * truth.square().mean().sqrt()))

    def build(layout: torch.memory_format, split: bool) -> list[Call]:
        laid_out = [[tensor.to(memory_format=layout) for tensor in one] for one in sets]
        return [_Pass(layer, direction, tensors, split) for tensors in laid_out]

    layouts = (torch.contiguous_format, torch.channels_last)
    ways = product((False, True), layouts)
    return {
        name: Variant(partial(build, layout, split), error_ratio)
        for name, (split, layout) in zip(VARIANTS, ways, strict=True)
        if layer.groups > 1 or not split
    }


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_vendor_convolution(
    compare: Compare, lab: Lab, layer: str, direction: str, dtype: str, batch: int, variant: str
) -> None:
    sized = CONVOLUTIONS[layer]
    if direction == "input_grad" and sized.shape[0] == 3:
        pytest.skip("the first layer learns no image")
    if variant.endswith("split") and sized.groups == 1:
        pytest.skip("not grouped")
    if lab.trial:
        sized = tiny_convolution(sized)

    def make() -> tuple[list[work.Work], dict[str, Variant]]:
        parts = work.convolution(sized, direction, batch, DTYPES[dtype].itemsize)
        return [parts], _variants(sized, direction, batch, dtype, lab, parts)

    compare(Key("vendor", "convolution", layer, direction, dtype, batch, ""), make)
