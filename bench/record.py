"""Records: what was measured, on what, with every sample, as checked JSON.

The dataclasses here are the schema: :func:`load` refuses a file that differs from them in a name
or a type, :func:`save` writes the whole file or nothing.
"""

import dataclasses
import json
import math
import statistics
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from alexkern.files import replacing

RESULTS = Path(__file__).parent / "results"
FORMAT = 1

T = TypeVar("T")


class RecordError(ValueError):
    """A file is not a record; the message names the file, the place in it and what it holds."""


@dataclass(frozen=True)
class Machine:
    """What a record was made on. Empty strings and zeros where there is no GPU."""

    gpu: str
    capability: str  # "sm_90"
    driver: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    cpu: str
    cores: int
    python: str
    torch: str
    triton: str
    cuda: str
    cudnn: str


@dataclass(frozen=True)
class Settings:
    """Torch's switches that change what a baseline does."""

    cudnn_benchmark: bool
    deterministic: bool


@dataclass(frozen=True)
class Ceilings:
    """The machine's limits, measured in the same run."""

    copy_bytes_per_second: float  # bytes read plus bytes written
    matmul_flops_per_second: dict[str, float]  # by dtype


@dataclass(frozen=True)
class Clocks:
    """The GPU's state right after the samples were taken."""

    sm_mhz: float
    memory_mhz: float
    power_watts: float
    temperature_celsius: float
    throttle_reasons: str


@dataclass(frozen=True)
class Key:
    """Which measurement: one variant of one direction of one layer of one op."""

    suite: str  # "ops", "network", "vendor", "tune", "host", "data", "parallel"
    op: str
    layer: str
    direction: str
    dtype: str
    batch: int
    variant: str

    @property
    def group(self) -> "Key":
        """The same for all variants that were timed together."""
        return dataclasses.replace(self, variant="")


@dataclass(frozen=True)
class Measurement:
    """Time of one call, with what is needed to judge it.

    Attributes:
        key: What was measured.
        seconds: Every sample, in the order they were taken; empty if ``failure`` says why.
        calls: Calls per sample; a sample is the mean over them.
        timing: Device time of ``"graph"`` (replays of a CUDA graph) or of ``"launches"`` (calls
            from Python), or the ``"host"``'s time.
        error_ratio: Error against float64 over what is allowed; at most 1 where it was timed.
        peak_bytes: Most memory that one call held beyond its operands.
        flops, bytes: Least work that the operation needs.
        floor_seconds: That work at the machine's measured limits.
        tf32: Whether torch's switches allowed TF32 for float32 products.
        kernels: Names of the kernels of one call, where they were looked up.
        clocks: State of the GPU, None without one.
        failure: Why there are no samples: the error's first line.
    """

    key: Key
    seconds: list[float]
    calls: int
    timing: str
    error_ratio: float | None
    peak_bytes: int | None
    flops: int
    bytes: int
    floor_seconds: float
    tf32: bool
    kernels: list[str] = field(default_factory=list)
    clocks: Clocks | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Of the samples, in seconds per call; NaN if there are none."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the median, by order statistics (no distribution assumed).

        The number of samples below the true median is binomial(n, 1/2).
        """
        ordered, n = sorted(self.seconds), len(self.seconds)
        if not n:
            return math.nan, math.nan
        below = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
        return ordered[below], ordered[n - 1 - below]

    @property
    def floor_share(self) -> float:
        """Floor over measured time: 1 at the hardware's limit."""
        return self.floor_seconds / self.median


@dataclass(frozen=True)
class Outcome:
    """Outcome of a test run on this machine; not ``complete`` if it was cut short."""

    passed: int
    failed: list[str]
    skipped: int
    complete: bool


@dataclass
class Record:
    """One machine, one commit, one day; a later run of the same adds to it."""

    format: int
    date: str
    commit: str
    machine: Machine
    settings: Settings
    ceilings: Ceilings
    measurements: list[Measurement] = field(default_factory=list)
    tests: dict[str, Outcome] = field(default_factory=dict)  # by what was tested

    def add(self, new: Iterable[Measurement]) -> None:
        """Add measurements; one of the same key is replaced."""
        by_key = {measurement.key: measurement for measurement in self.measurements}
        by_key |= {measurement.key: measurement for measurement in new}
        self.measurements = list(by_key.values())


def save(record: Any, path: Path) -> None:
    """Write a record of any of these dataclasses: the whole file or, on an error, nothing."""
    content = dataclasses.asdict(record)
    decode(type(record), content, str(path))
    with replacing(path) as file:
        file.write(_one_line_each(content).encode())


def load(kind: type[T], path: Path) -> T:
    """Read and check a record.

    Raises:
        RecordError: The file is missing, no JSON, or not of this kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: {error}") from error
    record: T = decode(kind, content, str(path))
    if content.get("format", FORMAT) != FORMAT:
        raise RecordError(f"{path}: format {content['format']}, this program reads {FORMAT}")
    return record


def newest(results: Path = RESULTS, *, gpu: bool = True) -> Path | None:
    """The record with the latest date of those made on a GPU, or on none; None without any."""
    folders = (path for path in results.glob("*/") if path.name != "compile")
    chosen = (folder for folder in folders if (folder.name != "cpu") == gpu)
    found = (path for folder in chosen for path in folder.glob("*.json"))
    return max(found, key=lambda path: path.name, default=None)


def decode(kind: Any, value: Any, where: str) -> Any:
    """JSON content as ``kind``; exact in names and types, but an int may stand for a float."""
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return decode(kind, value, where)
    if origin is list and isinstance(value, list):
        return [decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: decode(arguments[1], v, f"{where}.{name}") for name, v in value.items()}
    allowed = (int, float) if kind is float else kind
    if origin is None and isinstance(value, allowed) and isinstance(value, bool) == (kind is bool):
        return value
    raise RecordError(f"{where}: expected {kind}, got {value!r:.80}")


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        names = sorted(value.keys() ^ hints.keys()) if isinstance(value, dict) else value
        raise RecordError(f"{where}: not a {kind.__name__}: {names!r:.200}")
    return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in hints})


def _one_line_each(content: dict[str, Any]) -> str:
    """JSON with a line per item of the outermost lists, so that changes read well in a diff."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            items = ",\n".join("    " + json.dumps(item, separators=(",", ":")) for item in value)
            parts.append(f"  {json.dumps(name)}: [\n{items}\n  ]")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
