"""augment at the paper's sizes: 224x224 crops of stored 256x256 images, mirrored, shifted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from bench import work
from bench.lab import Lab
from bench.layers import AUGMENTATION, PACKING
from bench.machine import DTYPES
from bench.operation import Function, Subject

DIRECTIONS = ("forward",)
VARIANTS, FULL_VARIANTS = ("alexkern", "eager_nchw", "compile"), ("compile_max_autotune",)
STD = 57.6


def subject(dtype: str = "bf16", trial: bool = False, packed: bool = False) -> Subject:
    """To crops in that dtype, packed for conv1 or as they are; small ones in a trial."""
    stored, *crop = (20, 16, 16) if trial else AUGMENTATION
    plain: dict[str, Any] = {"padding": (0, 0, 0, 0), "space_to_depth": 1}
    packing = PACKING if packed else plain

    def operands(batch: int, randn: Function) -> list[Tensor]:
        """Images are [B, H, 3 W]: a fourth dimension would be taken for one of NCHW."""
        uniform = torch.rand(batch, stored, 3 * stored, device=randn(1).device)
        corners = torch.rand(batch, 2, device=uniform.device) * (stored - crop[0] + 1)
        return [
            (uniform * 256).to(torch.uint8),
            corners.long(),
            randn(batch) > 0,
            120 + randn(*crop, 3).float(),
            10 * randn(batch, 3).float(),
        ]

    def ours(images: Tensor, corners: Tensor, flips: Tensor, mean: Tensor, shift: Tensor) -> Tensor:
        stored_images = images.unflatten(2, (-1, 3))
        arguments = stored_images, corners, flips, mean, STD, shift
        return ops.augment(*arguments, dtype=DTYPES[dtype], **packing)

    def theirs(
        images: Tensor, corners: Tensor, flips: Tensor, mean: Tensor, shift: Tensor
    ) -> Tensor:
        """As it is written with indices; the truth has all operands in float64."""
        height, width, _ = mean.shape
        row = corners[:, :1].long() + torch.arange(height, device=images.device)
        column = corners[:, 1:].long() + torch.arange(width, device=images.device)
        column = torch.where(flips[:, None].bool(), column.flip(1), column)
        image = torch.arange(len(images), device=images.device)[:, None, None]
        crops = images.unflatten(2, (-1, 3))[image, row[:, :, None], column[:, None, :]]
        value = (crops.to(mean.dtype) - mean + shift[:, None, None, :]) / STD
        exact = mean.dtype == torch.float64
        output: Tensor = value.to(torch.float64 if exact else DTYPES[dtype])
        output = output.permute(0, 3, 1, 2)
        if packed:
            output = F.pixel_unshuffle(F.pad(output, packing["padding"]), packing["space_to_depth"])
        return output

    def counted(direction: str, batch: int, itemsize: int) -> work.Work:
        return work.augmentation((crop[0], crop[1]), batch, itemsize, packing["padding"])

    return Subject(
        "augment",
        "augment packed" if packed else "augment",
        ours,
        theirs,
        operands,
        counted,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_augment(compare_op: Callable[[Subject], None], lab: Lab, dtype: str, packed: bool) -> None:
    compare_op(subject(dtype, lab.trial, packed))
