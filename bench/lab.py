"""The laboratory: variants of one thing, checked, timed side by side, and recorded."""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from alexkern.runtime.timing import Call, Program, captured, sample, side_stream
from bench import machine
from bench.record import Key, Measurement, Record, save
from bench.work import Work


@dataclass(frozen=True)
class Variant:
    """One way to compute something.

    Attributes:
        build: Makes its calls, one per set of operands; all do the same work.
        error_ratio: Error of the first call's result over what is allowed.
        graph: Whether to time replays of a CUDA graph; otherwise its launches count too.
    """

    build: Callable[[], Sequence[Call]]
    error_ratio: Callable[[Any], float]
    graph: bool = True


class DeviceLostError(Exception):
    """An error left the GPU unusable for this process: nothing measured after it counts."""


class Lab:
    """Measures on one device and keeps the record.

    Args:
        device: Where everything runs.
        record: Filled with every measurement.
        path: Where the record is saved after each group; None keeps it in memory.
        timed: False only checks results, without CUDA graphs.
    """

    def __init__(
        self, device: torch.device, record: Record, path: Path | None, timed: bool = True
    ) -> None:
        self.device, self.record, self.path = device, record, path
        self.timed = timed
        self.measured: dict[Key, Measurement] = {}

    @property
    def trial(self) -> bool:
        """Whether this only tries the program, on a CPU, on layers made small."""
        return self.device.type != "cuda"

    @property
    def l2_bytes(self) -> int:
        """The cache that calls shall find cold; 0 if nothing is timed."""
        return self.record.machine.l2_bytes if self.timed else 0

    def measure(
        self,
        group: Key,
        parts: Sequence[Work],
        variants: Mapping[str, Variant],
        names: bool = False,
    ) -> None:
        """Check every variant, time the right ones in turn, and record all.

        A variant that raises or is wrong gets a measurement that says so, and no time.

        Args:
            group: The key, but for the variant.
            parts: The least that a call must do, one part after the other.
            variants: By name.
            names: Whether to look up the names of a call's kernels.

        Raises:
            DeviceLostError: Nothing of this group is recorded.
        """
        torch.compiler.reset()
        with side_stream(self.device), machine.precision(group.dtype):
            measurements = self._measurements(group, parts, variants, names)
        self._keep(measurements)  # once the programs and their memory are gone

    def _measurements(
        self, group: Key, parts: Sequence[Work], variants: Mapping[str, Variant], names: bool
    ) -> list[Measurement]:
        programs: dict[str, Program] = {}
        found: dict[str, Measurement] = {}
        for name, variant in variants.items():
            blank = self._blank(dataclasses.replace(group, variant=name), parts)
            try:
                program, facts = self._prepare(variant, names)
                if self.timed:
                    programs[name] = program
            except Exception as error:
                facts = {"failure": _first_line(error)}
                self._check_device(error)
            found[name] = dataclasses.replace(blank, **facts)
        try:
            self._time(programs, found)
        except Exception as error:
            raise DeviceLostError(_first_line(error)) from error
        return list(found.values())

    def keep_host(self, key: Key, seconds: list[float]) -> None:
        """Record times that were taken on the host by someone else."""
        measurement = dataclasses.replace(
            self._blank(key, []), seconds=seconds, calls=1, timing="host"
        )
        self._keep([measurement])

    def _blank(self, key: Key, parts: Sequence[Work]) -> Measurement:
        """What is known before anything ran."""
        ceilings = self.record.ceilings
        return Measurement(
            key,
            seconds=[],
            calls=0,
            timing="",
            error_ratio=None,
            peak_bytes=None,
            flops=sum(part.flops for part in parts),
            bytes=sum(part.bytes for part in parts),
            floor_seconds=sum(part.floor_seconds(ceilings, key.dtype) for part in parts),
            tf32=machine.tf32_allowed(),
        )

    def _prepare(self, variant: Variant, names: bool) -> tuple[Program, dict[str, Any]]:
        """The checked program, and what is known of it before it is timed."""
        calls = variant.build()
        calls[0]()
        peak = self._peak_bytes(calls[0])
        program = Program(calls, self.device, variant.graph and self.timed)
        program.run()
        ratio = variant.error_ratio(program.result)
        if not ratio <= 1:
            raise AssertionError(f"wrong result: error is {ratio:.3g} times what is allowed")
        facts = {
            "calls": program.length,
            "timing": program.timing,
            "error_ratio": ratio,
            "peak_bytes": peak,
            "kernels": _kernel_names(calls[0], self.device) if names else [],
        }
        return program, facts

    def _check_device(self, error: Exception) -> None:
        """Whether work and captures still go through after an error."""
        if self.trial:
            return
        try:
            captured(lambda: torch.randn(1, device=self.device))
            torch.randn(1, device=self.device)
            torch.cuda.synchronize()
        except Exception as second:
            raise DeviceLostError(_first_line(error)) from second

    def _time(self, programs: Mapping[str, Program], found: dict[str, Measurement]) -> None:
        rounds = {"rounds": 3} if self.trial else {}
        seconds = sample(programs, self.device, **rounds)
        clocks = machine.clocks()
        for name, samples in seconds.items():
            found[name] = dataclasses.replace(found[name], seconds=samples, clocks=clocks)

    def _keep(self, measurements: Sequence[Measurement]) -> None:
        self.measured |= {measurement.key: measurement for measurement in measurements}
        self.record.add(measurements)
        if self.path:
            save(self.record, self.path)
        gc.collect()
        if not self.trial:
            torch.cuda.empty_cache()

    def _peak_bytes(self, call: Call) -> int | None:
        """Most memory that a call, its result included, holds beyond what was held before."""
        if self.trial:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _kernel_names(call: Call, device: torch.device) -> list[str]:
    """The names of the kernels that a call runs, in order; of the operators on a CPU."""
    gpu = device.type == "cuda"
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CUDA if gpu else activities.CPU]) as profile:
        call()
        if gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    return [event.name for event in profile.events() if event.device_type == kind]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
