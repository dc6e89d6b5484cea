"""max_pool2d on the paper's three layers: 3x3 windows, stride 2."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from bench import work
from bench.lab import Lab
from bench.layers import POOLS, tiny
from bench.operation import Subject


def subject(number: str, trial: bool = False) -> Subject:
    """The layer of that number, or a small one of its kind."""
    shape = tiny(POOLS[number]) if trial else POOLS[number]
    return Subject(
        "max_pool2d",
        f"pool{number}",
        _ours,
        lambda x: F.max_pool2d(x, 3, 2),
        lambda batch, randn: [randn(batch, *shape).relu().requires_grad_()],
        lambda direction, batch, itemsize: work.pooling(shape, batch, itemsize),
    )


def _ours(x: Tensor) -> Tensor:
    output = ops.max_pool2d(x, 3, 2)
    assert isinstance(output, Tensor)  # a pair only if indices are asked for
    return output


@pytest.mark.parametrize("layer", POOLS)
def test_max_pool2d(compare_op: Callable[[Subject], None], lab: Lab, layer: str) -> None:
    compare_op(subject(layer, lab.trial))
