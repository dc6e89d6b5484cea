"""linear_bias_relu_dropout on the paper's layers that have dropout."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from bench import work
from bench.lab import Lab
from bench.layers import DROPOUTS, FULLY_CONNECTED
from bench.operation import Subject

VARIANTS, FULL_VARIANTS = ("alexkern", "eager_nchw", "compile"), ("compile_max_autotune",)


def subject(number: str, trial: bool = False) -> Subject:
    """The layer of that number, or a small one of its kind."""
    name = f"fc{number}"
    inputs, outputs = FULLY_CONNECTED[name]
    layer = (inputs // 16, outputs // 16) if trial else (inputs, outputs)
    return Subject(
        "linear_bias_relu_dropout",
        name,
        lambda x, w, b: ops.linear_bias_relu_dropout(x, w, b, 0.5),
        lambda x, w, b: F.dropout(F.linear(x, w, b).relu(), 0.5),
        partial(_operands, layer),
        partial(work.fully_connected, layer),
        before_relu=F.linear,
        before_dropout=lambda x, w, b: F.linear(x, w, b).relu(),
    )


def _operands(layer: tuple[int, int], batch: int, randn: Callable[..., Tensor]) -> list[Tensor]:
    inputs, outputs = layer
    weight = randn(outputs, inputs) / inputs**0.5
    return [tensor.requires_grad_() for tensor in (randn(batch, inputs), weight, randn(outputs))]


@pytest.mark.parametrize("number", DROPOUTS)
def test_linear_bias_relu_dropout(
    compare_op: Callable[[Subject], None], lab: Lab, number: str
) -> None:
    compare_op(subject(number, lab.trial))
