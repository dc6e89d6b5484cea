"""local_response_norm on the paper's two layers, with the paper's constants."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F

import alexkern.ops as ops
from bench import work
from bench.lab import Lab
from bench.layers import NORMALISED, POOLS, tiny
from bench.operation import Subject


def subject(number: str, trial: bool = False) -> Subject:
    """The layer of that number, or a small one of its kind."""
    shape = tiny(POOLS[number]) if trial else POOLS[number]
    return Subject(
        "local_response_norm",
        f"lrn{number}",
        lambda x: ops.local_response_norm(x, 5, 1e-4, 0.75, 2.0, "sum"),
        lambda x: F.local_response_norm(x, 5, 5e-4, 0.75, 2.0),  # PyTorch divides alpha by size
        # grey levels' spread: with much smaller values the normalisation is a constant
        lambda batch, randn: [(60 * randn(batch, *shape)).relu().requires_grad_()],
        partial(work.normalisation, shape),
    )


@pytest.mark.parametrize("layer", NORMALISED)
def test_local_response_norm(compare_op: Callable[[Subject], None], lab: Lab, layer: str) -> None:
    compare_op(subject(layer, lab.trial))
