"""dropout on the paper's fully connected layers, which are alike."""

from collections.abc import Callable

import torch.nn.functional as F

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
        before_dropout=lambda x: x,
    )


def test_dropout(compare_op: Callable[[Subject], None]) -> None:
    compare_op(subject())
