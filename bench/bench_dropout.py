"""dropout on the paper's fully connected layers, which are alike."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from bench import work
from bench.layers import DROPOUTS
from bench.operation import Subject

VARIANTS, FULL_VARIANTS = ("alexkern", "eager_nchw", "compile"), ("compile_max_autotune",)


def subject(number: str = "6", trial: bool = False) -> Subject:
    """The layer of that number, the same in a trial."""
    (units,) = DROPOUTS[number]
    return Subject(
        "dropout",
        f"dropout{number}",
        lambda x: ops.dropout(x, 0.5),
        lambda x: F.dropout(x, 0.5),
        lambda batch, randn: [randn(batch, units).requires_grad_()],
        lambda direction, batch, itemsize: work.pointwise(batch * units, itemsize),
        _error_ratio,
    )


def _error_ratio(result: Tensor, read: Tensor) -> float:
    """Kept values are doubled to the bit; as many are kept as a fair coin would, to 5 sigma."""
    kept = result != 0
    if not torch.equal(result[kept], 2 * read[kept]):
        return float("inf")
    count = result.numel()
    deviation = math.sqrt(count / 4)
    return abs(float(kept.sum()) - count / 2) / (5 * deviation)


def test_dropout(compare_op: Callable[[Subject], None]) -> None:
    compare_op(subject())
