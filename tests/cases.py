"""A call of every op, for tests of how the ops compose with PyTorch."""

from collections.abc import Callable, Sequence

import pytest
import torch
from numerics import check_same, leaves
from torch import Tensor

from alexkern import ops

TAIL = {"size": 3, "alpha": 0.5, "kernel_size": 3, "pool_stride": 2}
# The op, by its name and what it is called with, on [2, 8, 7, 6], a weight and a bias.
CASES = {
    "local_response_norm": lambda x, w, b: ops.local_response_norm(x, 5, 0.5),
    "local_response_norm grouped": lambda x, w, b: ops.local_response_norm(
        x, 4, 0.5, 1.0, 2.0, "sum", 2
    ),
    "max_pool2d": lambda x, w, b: ops.max_pool2d(x, 3, 2),
    "max_pool2d padded": lambda x, w, b: ops.max_pool2d(x, 3, (2, 1), 1, 1, True),
    "max_pool2d with indices": lambda x, w, b: ops.max_pool2d(x, 2, return_indices=True)[0],
    "lrn_max_pool2d": lambda x, w, b: ops.lrn_max_pool2d(x, 5, 3, 2, alpha=0.5),
    "dropout": lambda x, w, b: ops.dropout(x, 0.4, seed=_seed(x)),
    "dropout of a shard": lambda x, w, b: ops.dropout(
        x, 0.4, mode="paper", seed=_seed(x), index_offset=3, row_stride=1000
    ),
    "linear_bias_relu_dropout": lambda x, w, b: ops.linear_bias_relu_dropout(
        x.flatten(2)[:, :, 0], w.flatten(1)[:, :8], b, 0.4, seed=_seed(x)
    ),
    "linear_bias_relu_dropout plain": lambda x, w, b: ops.linear_bias_relu_dropout(
        x.movedim(1, -1), w.flatten(1)[:, :8], None, 0.4, activation="none", seed=_seed(x)
    ),
    "conv2d_bias_relu": lambda x, w, b: ops.conv2d_bias_relu(x, w, b, 2, 1),
    "conv2d_bias_relu grouped": lambda x, w, b: ops.conv2d_bias_relu(
        x, w[:, :4], None, 1, (0, 1, 1, 0), 1, 2, "none"
    ),
    "conv2d_bias_relu_lrn_max_pool2d": lambda x, w, b: ops.conv2d_bias_relu_lrn_max_pool2d(
        x, w, b, 1, 1, **TAIL
    ),
}
WHOLE = [name for name in CASES if " " not in name]
# Variants, and the op whose passes are those of two others, in the long run of the tests only.
MOST_QUICKLY = [
    name if name in WHOLE and name.count("_") < 6 else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
]


def operands(
    randn: Callable[..., Tensor], dtype: torch.dtype = torch.float32, layout: str = "nchw"
) -> tuple[Tensor, ...]:
    """An image, a weight and a bias, all of which require grad."""
    image = randn(2, 8, 7, 6, dtype=dtype, layout=layout)
    weight, bias = randn(8, 8, 3, 2, dtype=dtype, seed=1) / 4, randn(8, dtype=dtype, seed=2)
    return leaves(image, weight, bias)


def _seed(like: Tensor) -> Tensor:
    return torch.full((), 7, dtype=torch.int64, device=like.device)


def value_and_grads(function: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, ...]:
    """And the gradients of half the output's sum of squares."""
    output = function(*operands)
    loss = output.float().square().sum() / 2
    grads = torch.autograd.grad(loss, operands, allow_unused=True)
    return output, *(grad for grad in grads if grad is not None)


def check_all_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit by bit, and in memory."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        check_same(one, other)
