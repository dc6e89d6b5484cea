"""Set up the benchmarks, and say plainly what a machine without a GPU leaves unmeasured."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from bench import machine, operation, report
from bench.lab import DeviceLostError, Lab, Variant
from bench.layers import BATCH
from bench.machine import DTYPES
from bench.operation import Operation, Subject
from bench.record import FORMAT, RESULTS, Ceilings, Key, Measurement, Record
from bench.work import Work

NO_GPU = "no GPU: a time in Triton's interpreter says nothing about the kernel"

_DTYPES, _ALL_DTYPES = ["bf16"], ["bf16", "fp16", "tf32"]
_BATCHES, _ALL_BATCHES = [BATCH], [1, BATCH, 1024]
# PyTorch's LRN has no bfloat16 on a CPU.
_TRIAL_DTYPES, _TRIAL_BATCHES = ["fp32"], [2]

_LAB = pytest.StashKey[Lab]()
_RATES: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest bench/`."""
    group = parser.getgroup("alexkern")
    group.addoption(
        "--full",
        action="store_true",
        help="also fp16 and TF32, batches of 1 and 1024, NCHW kernels, max-autotune per op",
    )
    group.addoption(
        "--tune", action="store_true", help="only: every candidate configuration of each kernel"
    )
    group.addoption(
        "--vendor", action="store_true", help="only: cuDNN's convolutions, and their kernels"
    )
    group.addoption(
        "--trial",
        action="store_true",
        help="try the benchmarks on a CPU with tiny layers; their times mean nothing",
    )
    group.addoption(
        "--results",
        type=Path,
        default=None,
        help=f"folder for the record (default: {RESULTS.name}/ beside the benchmarks, on a GPU)",
    )


class _Clock:
    """A timer for pytest-benchmark that shows the device's time instead of the host's."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, benchmark: Any, measurement: Measurement) -> None:
        """Hand a measurement's samples to pytest-benchmark, one per round."""
        seconds = itertools.cycle(measurement.seconds or [0.0])

        def advance() -> None:
            self.now += next(seconds)

        benchmark.pedantic(advance, rounds=max(len(measurement.seconds), 1))


_CLOCK = _Clock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in dtype, batch, direction and variant, where a test does not do it itself.

    Directions and variants are the module's DIRECTIONS, VARIANTS and FULL_VARIANTS, or an op's.
    """
    full, trial = metafunc.config.getoption("full"), metafunc.config.getoption("trial")

    def named(name: str) -> Sequence[str]:
        return getattr(metafunc.module, name, getattr(operation, name))  # type: ignore[no-any-return]

    values: dict[str, Sequence[Any]] = {
        "dtype": _TRIAL_DTYPES if trial else _ALL_DTYPES if full else _DTYPES,
        "batch": _TRIAL_BATCHES if trial else _ALL_BATCHES if full else _BATCHES,
        "direction": named("DIRECTIONS"),
        "variant": (*named("VARIANTS"), *(named("FULL_VARIANTS") if full else ())),
    }
    marks = metafunc.definition.iter_markers("parametrize")
    own = {name for mark in marks for name in _names(mark.args[0])}
    for name in metafunc.fixturenames:
        if name in values and name not in own:
            metafunc.parametrize(name, values[name])


def _names(arguments: str | Sequence[str]) -> Sequence[str]:
    return arguments.split(",") if isinstance(arguments, str) else arguments


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group variants in pytest-benchmark's tables; keep what --tune or --vendor asks for."""
    apart = {
        "bench_tune.py": config.getoption("tune"),
        "bench_vendor.py": config.getoption("vendor"),
    }
    default = not any(apart.values())
    left_out = [item for item in items if not apart.get(item.path.name, default)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        if "compare" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_CLOCK, group=_group(item)))
            if config.pluginmanager.hasplugin("timeout"):  # one test measures a whole group
                item.add_marker(pytest.mark.timeout(0))


def _parameters(item: Any) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def _group(item: Any) -> str:
    """The name of a test without its variant."""
    others = (str(v) for name, v in sorted(_parameters(item).items()) if name != "variant")
    return " ".join((item.originalname, *others))


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Lab:
    """The laboratory, on the first GPU (or with --trial on the CPU)."""
    option = request.config.getoption
    trial, results, full = option("trial"), option("results"), option("full")
    timed = not option("benchmark_disable")
    if trial:
        device, dtypes = torch.device("cpu"), list(DTYPES)
    elif torch.cuda.is_available():
        device, dtypes = torch.device("cuda", 0), ["bf16", "tf32", *(["fp16"] if full else [])]
    else:
        pytest.skip(NO_GPU)
    path = None
    if timed and (results or not trial):
        record, path = machine.open_record(results or RESULTS, device, dtypes)
    else:
        none = Ceilings(math.inf, dict.fromkeys(DTYPES, math.inf))
        ceilings = machine.ceilings(device, dtypes) if timed else none
        record = Record(FORMAT, "", "", machine.describe(), machine.settings(), ceilings)
    request.config.stash[_LAB] = Lab(device, record, path, timed)
    return request.config.stash[_LAB]


Made = tuple[Sequence[Work], Mapping[str, Variant]]
Compare = Callable[[Key, Callable[[], Made]], None]


@pytest.fixture(scope="session")
def made() -> Callable[[Key, Callable[[], Made]], Made]:
    """Make a group's operands and truth once; to be called with its key and how to make it."""
    last: dict[Key, Made | Exception] = {}

    def once(group: Key, make: Callable[[], Made]) -> Made:
        if group not in last:
            last.clear()
            try:
                last[group] = make()
            except Exception as error:
                last[group] = error
        found = last[group]
        if isinstance(found, Exception):
            raise found
        return found

    return once


@pytest.fixture
def compare(lab: Lab, made: Any, benchmark: Any, request: Any, variant: str) -> Compare:
    """Measure a test's whole group once, and report the test's own variant of it.

    The group is all variants that this run selected, timed side by side by the first of its
    tests; without timing each test checks its own. To be called with the group's key, and a
    function that makes the parts of its work and its variants.
    """

    def run(group: Key, make: Callable[[], Made]) -> None:
        key = dataclasses.replace(group, variant=variant)
        if key not in lab.measured:
            parts, variants = made(group, make)
            selected = {
                item.callspec.params["variant"]
                for item in (request.session.items if lab.timed else [request.node])
                if "compare" in getattr(item, "fixturenames", ())
                and _group(item) == _group(request.node)
            }
            chosen = {name: v for name, v in variants.items() if name in selected}
            try:
                lab.measure(group, parts, chosen, names=group.suite == "vendor")
            except DeviceLostError as error:
                pytest.exit(f"the GPU is lost to this process: {error}", returncode=3)
        measurement = lab.measured[key]
        if measurement.failure:
            too_large = measurement.failure.startswith("OutOfResources")  # a tile, for this GPU
            (pytest.skip if too_large else pytest.fail)(measurement.failure)
        benchmark.extra_info |= {
            "percent_of_floor": 100 * measurement.floor_share,
            "error_ratio": measurement.error_ratio,
            "timing": measurement.timing,
            "peak_bytes": measurement.peak_bytes,
        }
        _CLOCK.play(benchmark, measurement)

    return run


@pytest.fixture
def compare_op(
    compare: Compare, lab: Lab, direction: str, dtype: str, batch: int
) -> Callable[[Subject], None]:
    """Compare an op with its counterpart; to be called with the subject."""

    def run(subject: Subject) -> None:
        def make() -> Made:
            made = Operation(subject, direction, batch, DTYPES[dtype], lab.device, lab.l2_bytes)
            ways = operation.implementations(subject.ours, subject.theirs, lab.trial)
            return [made.work], {name: made.variant(way) for name, way in ways.items()}

        compare(Key("ops", subject.op, subject.layer, direction, dtype, batch, ""), make)

    return run


Keep = Callable[[Key], None]


@pytest.fixture
def keep(benchmark: Any, request: pytest.FixtureRequest) -> Keep:
    """Put the host's times of a test into the record, where there is one.

    To be called with the measurement's key after the benchmark has run.
    """

    def run(key: Key) -> None:
        if not benchmark.stats:  # none under --benchmark-disable
            return
        if key.suite == "data":
            rate = benchmark.extra_info["images_per_second"] = key.batch / benchmark.stats["median"]
            _RATES[request.node.name] = rate
        if torch.cuda.is_available() or request.config.getoption("trial"):
            lab: Lab = request.getfixturevalue("lab")
            lab.keep_host(key, list(benchmark.stats["data"]))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print percent of floor and the data pipeline's rates, and count what was not measured."""
    write = terminalreporter.write_line
    for name, rate in _RATES.items():
        write(f"{name}: {rate:,.0f} images/s on one core")
    lab = config.stash.get(_LAB, None)
    if lab is not None:
        record = dataclasses.replace(lab.record, measurements=list(lab.measured.values()))
        write(report.short(record))
        if lab.path:
            write(f"record: {lab.path}")
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_GPU in str(r.longrepr)]
    if skipped:
        write(
            f"{len(skipped)} benchmarks need a GPU and were skipped: the ops and the network "
            "against cuDNN (NCHW and channels_last) and torch.compile. Measured above: host "
            "overhead of a call, the data pipeline and steps of several processes."
        )
