"""Made-up records to test the benchmarks' tools with."""

import dataclasses
from typing import Any

from bench import machine
from bench.record import FORMAT, Ceilings, Clocks, Key, Measurement, Outcome, Record


def measurement(variant: str = "alexkern", seconds: Any = (3e-6, 1e-6, 2e-6), **new: Any) -> Any:
    made = Measurement(
        Key("ops", "max_pool2d", "pool1", "forward", "bf16", 128, variant),
        list(seconds),
        calls=10,
        timing="graph",
        error_ratio=0.5,
        peak_bytes=1000,
        flops=0,
        bytes=2000,
        floor_seconds=1e-6,
        tf32=False,
        clocks=Clocks(1980.0, 3201.0, 400.0, 50.0, "0x0"),
    )
    return dataclasses.replace(made, **new)


def record(*measurements: Measurement) -> Record:
    ceilings = Ceilings(4.3e12, {"bf16": 790e12, "tf32": 395e12})
    described = dataclasses.replace(machine.describe(), gpu="NVIDIA H200")
    made = Record(FORMAT, "2026-01-02", "abc", described, machine.settings(), ceilings)
    made.add(measurements)
    made.tests["suite"] = Outcome(10, ["tests/test_a.py::test_b"], 1, complete=True)
    return made
