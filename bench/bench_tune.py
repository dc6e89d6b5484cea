"""Every candidate configuration of the memory-bound kernels: `pytest bench/ --tune`.

Checked and timed, with `--benchmark-disable` only checked. ``shipped`` is what the ops choose
themselves. Convolutions have a command of their own, `alexkern tune`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest

from alexkern import use_backend
from alexkern.runtime import config
from bench import bench_augment, bench_dropout, bench_linear, bench_lrn, bench_pool
from bench.conftest import Compare
from bench.lab import Lab, Variant
from bench.layers import NORMALISED, POOLS
from bench.machine import DTYPES
from bench.operation import Implementation, Operation, Subject
from bench.record import Key
from bench.work import Work

Candidates = dict[str, Any]


def _candidates() -> Candidates:
    """By a name that lists the configuration's numbers in the order of its fields."""
    found = config.candidates(config.PointwiseConfig)
    named = {"-".join(map(str, dataclasses.astuple(c))): c for c in found}
    return {"shipped": None, **named}


_POINTWISE = _candidates()


@contextmanager
def _in_force(configuration: Any) -> Iterator[None]:
    with use_backend("triton"):
        if configuration is None:
            yield
        else:
            with config.forced(configuration):
                yield


def _tune(
    compare: Compare, lab: Lab, subject: Subject, direction: str, batch: int, candidates: Candidates
) -> None:
    dtype = "fp32" if lab.trial else "bf16"

    def make() -> tuple[list[Work], dict[str, Variant]]:
        pass_ = "forward" if direction == "forward" else "backward"
        made = Operation(subject, pass_, batch, DTYPES[dtype], lab.device, lab.l2_bytes)
        variants = {}
        for name, configuration in candidates.items():
            context: Callable[[], AbstractContextManager[Any]] = partial(_in_force, configuration)
            variants[name] = made.variant(Implementation(subject.ours, context=context))
        return [subject.work(direction, batch, DTYPES[dtype].itemsize)], variants

    compare(Key("tune", subject.op, subject.layer, direction, dtype, batch, ""), make)


_MEMORY_BOUND: dict[str, tuple[Callable[[str, bool], Subject], str]] = {
    **{f"lrn{number}": (bench_lrn.subject, number) for number in NORMALISED},
    **{f"pool{number}": (bench_pool.subject, number) for number in POOLS},
    "dropout": (bench_dropout.subject, "6"),
    "fc6": (bench_linear.subject, "6"),
    "augment": (bench_augment.subject, "bf16"),
}


@pytest.mark.parametrize("variant", _POINTWISE)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layer", _MEMORY_BOUND)
def test_memory_bound(
    compare: Compare, lab: Lab, layer: str, direction: str, batch: int, variant: str
) -> None:
    if layer == "augment" and direction == "backward":
        pytest.skip("images learn nothing")
    subject, which = _MEMORY_BOUND[layer]
    _tune(compare, lab, subject(which, lab.trial), direction, batch, _POINTWISE)
