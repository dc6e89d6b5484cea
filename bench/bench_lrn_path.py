"""The steps of docs/kernel-path.md: LRN forward from the formula to the speed of memory."""

from functools import partial

from bench import bench_lrn, lrn_path
from bench.conftest import Compare
from bench.lab import Lab, Variant
from bench.machine import DTYPES
from bench.operation import Implementation, Operation
from bench.record import Key
from bench.work import Work

VARIANTS, FULL_VARIANTS = (*lrn_path.STEPS, "eager_channels_last"), ()
DIRECTIONS = ("forward",)


def test_lrn_path(compare: Compare, lab: Lab, dtype: str, batch: int) -> None:
    def make() -> tuple[list[Work], dict[str, Variant]]:
        subject = bench_lrn.subject("1", lab.trial)
        made = Operation(subject, "forward", batch, DTYPES[dtype], lab.device, lab.l2_bytes)
        ways = {step: Implementation(partial(lrn_path.run, step)) for step in lrn_path.STEPS}
        ways["eager_channels_last"] = Implementation(subject.theirs)
        return [made.work], {name: made.variant(way) for name, way in ways.items()}

    compare(Key("path", "local_response_norm", "lrn1", "forward", dtype, batch, ""), make)
