"""Two records side by side: what became slower or faster beyond noise.

    python -m bench compare OLD.json NEW.json

A difference counts if the 95 % intervals of the two medians do not overlap and the medians differ
by more than 2 %, which two runs of the same code can. Exit code 1 if something became slower, or
is no longer right.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.record import Measurement, Record, load

_NOISE = 0.02


def changes(old: Record, new: Record) -> tuple[list[str], list[str]]:
    """Lines for what became slower (or wrong), and for what became faster."""
    before = {m.key: m for m in old.measurements}
    slower: list[str] = []
    faster: list[str] = []
    for now in new.measurements:
        then = before.get(now.key)
        if then is None or not then.seconds:
            continue
        if not now.seconds:
            slower.append(f"{_name(now)}: {now.failure}")
        elif _differ(then, now):
            times = f"{1e6 * then.median:.1f} -> {1e6 * now.median:.1f} us"
            line = f"{_name(now)}: {times} ({now.median / then.median:.2f}x)"
            (slower if now.median > then.median else faster).append(line)
    return slower, faster


def _differ(then: Measurement, now: Measurement) -> bool:
    (low_then, high_then), (low_now, high_now) = then.interval, now.interval
    apart = low_now > high_then or high_now < low_then
    return apart and abs(now.median / then.median - 1) > _NOISE


def _name(measurement: Measurement) -> str:
    key = measurement.key
    return f"{key.layer} {key.direction} {key.dtype} {key.batch} {key.variant}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parsed = parser.parse_args(arguments)
    old, new = load(Record, parsed.old), load(Record, parsed.new)
    for name in ("gpu", "driver", "torch", "triton", "cudnn"):
        here, there = getattr(old.machine, name), getattr(new.machine, name)
        if here != there:
            print(f"not the same {name}: {here} and {there}")
    slower, faster = changes(old, new)
    common = {m.key for m in old.measurements} & {m.key for m in new.measurements}
    print(f"{len(common)} measurements in both: {len(slower)} slower, {len(faster)} faster")
    for line in slower:
        print(f"slower  {line}")
    for line in faster:
        print(f"faster  {line}")
    return 1 if slower else 0
