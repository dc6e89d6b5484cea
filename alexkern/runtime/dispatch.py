"""Who computes a pass of a convolution: what a measurement found fastest on this GPU.

A table holds, per GPU, what :mod:`alexkern.tuning` measured: for each :class:`Convolution` the
time of every candidate that gave the right result. Tables that ship lie in ``alexkern/tables``
(none was measured yet); the user's own, in the folder that ``ALEXKERN_TABLES`` names (by default
``~/.cache/alexkern``), overrule them. Only a table of this GPU and of these versions counts.
Without an entry `auto` takes the vendor, and `triton` the heuristic of :mod:`.config`.
"""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from alexkern.files import replacing
from alexkern.runtime.config import MatmulConfig
from alexkern.runtime.launch import device_code
from alexkern.runtime.vendor import VARIANTS

DIRECTIONS = ("forward", "input_grad", "weight_grad")
SHIPPED = Path(__file__).parents[1] / "tables"
_FORMAT = 1


class TableError(Exception):
    """A table's file that cannot be used."""


@dataclass(frozen=True)
class Convolution:
    """One pass of one convolution: all that its speed depends on.

    Attributes:
        direction: One of DIRECTIONS.
        dtype: ``"float32"`` (IEEE), ``"tf32"``, ``"float16"`` or ``"bfloat16"``.
        channels_last: Layout of input, output and their gradients.
        input: [N, C, H, W].
        weight: [C_out, C // groups, height, width].
        stride: Of height and width.
        padding: Left, right, top, bottom.
        dilation: Of height and width.
        groups: Of channels.
    """

    direction: str
    dtype: str
    channels_last: bool
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Choice:
    """The vendor in one of :data:`.vendor.VARIANTS`, or this project's kernels.

    Attributes:
        vendor: The variant; empty for this project's.
        tile: Of the kernels; None leaves it to the heuristic.
    """

    vendor: str = ""
    tile: MatmulConfig | None = None

    def __str__(self) -> str:
        if self.vendor:
            return f"vendor {self.vendor}"
        return f"triton {self.tile.name}" if self.tile else "triton"

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """The inverse of ``str``.

        Raises:
            ValueError: Another text.
        """
        who, _, what = text.partition(" ")
        if who == "vendor" and what in VARIANTS:
            return cls(vendor=what)
        if who != "triton":
            raise ValueError(f"not a choice: {text!r}")
        return cls(tile=MatmulConfig.parse(what) if what else None)


@dataclass(frozen=True)
class Candidate:
    """What was measured of a choice.

    Attributes:
        choice: As text.
        microseconds: The median; None if it failed.
        error_ratio: Its error over what is allowed; None if it raised.
        failure: Why it cannot be chosen; empty if it can.
    """

    choice: str
    microseconds: float | None
    error_ratio: float | None
    failure: str = ""


@dataclass(frozen=True)
class Table:
    """What was measured on one GPU."""

    gpu: str
    versions: dict[str, str]
    entries: dict[Convolution, list[Candidate]]

    def best(self, problem: Convolution, who: str = "") -> Candidate | None:
        """The fastest right candidate, or that of ``"vendor"`` or ``"triton"``; None without."""
        right = [
            candidate
            for candidate in self.entries.get(problem, [])
            if candidate.microseconds is not None
            and not candidate.failure
            and candidate.choice.startswith(who)
        ]
        return min(right, key=lambda candidate: candidate.microseconds or 0.0, default=None)


def versions() -> dict[str, str]:
    """On what a measurement depends, beside the GPU."""
    import triton

    return {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        "kernels": _kernels(),
    }


@cache
def _kernels() -> str:
    """What stands for the code that was checked."""
    return hashlib.sha256(inspect.getsource(device_code("conv")).encode()).hexdigest()[:12]


def user_folder() -> Path:
    """Where the user's own tables lie."""
    # without a home this is a folder that is not there
    return Path(os.environ.get("ALEXKERN_TABLES") or os.path.expanduser("~/.cache/alexkern"))


def table_path(folder: Path, gpu: str) -> Path:
    """A GPU's table in a folder."""
    return folder / f"{gpu.lower().replace(' ', '-')}.json"


def load(path: Path) -> Table:
    """Read a table.

    Raises:
        TableError: Not a table of this format.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise TableError(
                f"{path} has format {content['format']}, expected {_FORMAT}: delete it, or measure "
                "again with `alexkern tune`"
            )
        entries = {
            _convolution(entry["convolution"]): [Candidate(**c) for c in entry["candidates"]]
            for entry in content["entries"]
        }
        for candidates in entries.values():
            for candidate in candidates:
                Choice.parse(candidate.choice)
        return Table(content["gpu"], content["versions"], entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(f"{path} is no table: {type(error).__name__}: {error}") from error


def _convolution(fields: dict[str, Any]) -> Convolution:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Convolution(**values)


def save(table: Table, path: Path) -> None:
    """Write a table, whole or not at all."""
    content = {
        "format": _FORMAT,
        "gpu": table.gpu,
        "versions": table.versions,
        "entries": [
            {
                "convolution": dataclasses.asdict(problem),
                "candidates": [dataclasses.asdict(candidate) for candidate in candidates],
            }
            for problem, candidates in table.entries.items()
        ],
    }
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


@cache
def _installed(gpu: str) -> Table | None:
    """What counts on a GPU: the shipped table, overruled by the user's."""
    found = [
        load(path)
        for folder in (SHIPPED, user_folder())
        if (path := table_path(folder, gpu)).exists()
    ]
    fitting = [table for table in found if table.gpu == gpu and table.versions == versions()]
    if not fitting:
        return None
    entries: dict[Convolution, list[Candidate]] = {}
    for table in fitting:
        entries |= table.entries
    return Table(gpu, versions(), entries)


def table_of(device: torch.device) -> Table | None:
    """The table that counts on a device."""
    return _installed(gpu_name(device))


def table_digest(device: torch.device) -> str:
    """Of what counts on a device, empty for nothing: processes of one run must agree on it."""
    table = table_of(device)
    return hashlib.sha256(repr(table).encode()).hexdigest() if table else ""


@cache
def gpu_name(device: torch.device) -> str:
    """A GPU's name; ``"cpu"`` and such for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def reload() -> None:
    """Read the tables again when next needed."""
    _installed.cache_clear()
    _chosen.cache_clear()


_recorders: list[dict[Convolution, None]] = []


@contextmanager
def recorded() -> Iterator[dict[Convolution, None]]:
    """Collect the distinct convolutions that are computed in the block, on any thread."""
    problems: dict[Convolution, None] = {}
    _recorders.append(problems)
    try:
        yield problems
    finally:
        # not remove(), for which equal dictionaries are the same
        _recorders[:] = [other for other in _recorders if other is not problems]


def choose(problem: Convolution, device: torch.device, backend: str) -> Choice:
    """Who computes a pass: this project's fastest under ``triton``, anybody's under ``auto``.

    ``torch.use_deterministic_algorithms`` and ``torch.backends.cudnn`` hold for the vendor as
    they always do; this project's kernels are deterministic.
    """
    for recorder in _recorders:
        recorder[problem] = None
    return _chosen(problem, device, backend)


@lru_cache(maxsize=4096)
def _chosen(problem: Convolution, device: torch.device, backend: str) -> Choice:
    table = table_of(device)
    best = table.best(problem, "triton" if backend == "triton" else "") if table else None
    if best:
        return Choice.parse(best.choice)
    if backend == "triton":
        return Choice()
    return Choice(vendor="channels_last" if problem.channels_last else "nchw")
