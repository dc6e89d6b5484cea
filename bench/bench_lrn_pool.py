"""lrn_max_pool2d on the paper's two layers: what stands between their convolutions."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F
from torch import Tensor

import alexkern.ops as ops
from bench import work
from bench.lab import Lab
from bench.layers import NORMALISED, POOLS, tiny
from bench.operation import Subject


def subject(number: str, trial: bool = False) -> Subject:
    """The layer of that number, or a small one of its kind."""
    shape = tiny(POOLS[number]) if trial else POOLS[number]
    return Subject(
        "lrn_max_pool2d",
        f"lrn_pool{number}",
        lambda x: ops.lrn_max_pool2d(x, 5, 3, 2, alpha=1e-4, k=2.0, alpha_mode="sum"),
        plain,
        # grey levels' spread: with much smaller values the normalisation is a constant
        lambda batch, randn: [(60 * randn(batch, *shape)).relu().requires_grad_()],
        partial(work.normalisation_pooling, shape),
    )


def plain(x: Tensor) -> Tensor:
    """The paper's normalisation and pooling in PyTorch, which divides alpha by size."""
    return F.max_pool2d(F.local_response_norm(x, 5, 5e-4, 0.75, 2.0), 3, 2)


@pytest.mark.parametrize("layer", NORMALISED)
def test_lrn_max_pool2d(compare_op: Callable[[Subject], None], lab: Lab, layer: str) -> None:
    compare_op(subject(layer, lab.trial))
