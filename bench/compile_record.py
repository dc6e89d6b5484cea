"""The compile record: what the compiler made of every kernel, and the time that this predicts.

One entry per launch of a layer, target, dtype and layout, kept per triton version in
``results/compile``. Everything is read from compiled code and from the arguments of a launch
that was not made. The time is a *prediction*, never a measurement: the largest of

- bytes: every operand read or written once, at the memory's speed (also where the L2 cache
  would hold it);
- instructions: those that the warps execute, if every scheduler issued one in every cycle;
- arithmetic: a convolution's products, at the speed of the tensor cores or of the fp32 units.

Latency, launches, shared memory and a last wave that fills part of the GPU are left out: it is
meant as a lower bound, to be corrected by a run on a GPU.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.programs import WARP, Binary
from bench.record import RESULTS


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU, per second, and of one of its multiprocessors."""

    name: str
    multiprocessors: int
    clock: float
    copy_bytes: float  # read plus written
    half_flops: float  # of the tensor cores, dense, in bf16 and fp16
    tf32_flops: float
    fp32_flops: float  # without tensor cores
    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    tensor_memory: int = 512  # columns; where there is any


# H200: what a copy and matrix products reached on one. A100 (80 GB, SXM) and B200: nominal, from
# data sheets, without sparsity; less than that is reached.
GPUS = {
    "sm_80": Gpu("A100", 108, 1.41e9, 2.0e12, 312e12, 156e12, 19.5e12, 164 * 1024),
    "sm_90": Gpu("H200", 132, 1.98e9, 4.3e12, 790e12, 395e12, 67e12, 228 * 1024),
    "sm_100": Gpu("B200", 148, 1.965e9, 8.0e12, 2250e12, 1125e12, 75e12, 228 * 1024),
}
_WARP_INSTRUCTIONS_PER_CYCLE = 4  # per multiprocessor: one per scheduler


@dataclass(frozen=True)
class CompiledKernel:
    """One launch of a layer, compiled for one target.

    Attributes:
        layer, direction, kernel, number: Which launch; ``number`` counts from 1 the launches of
            this kernel in this layer and direction.
        stem, dtype, layout, target: As in :mod:`bench.static`.
        blocks: Block sizes and the vector's width.
        num_warps, num_stages: As given to the compiler.
        registers, spilled_bytes: Per thread; spilled is what a thread keeps in local memory.
        shared_bytes: Per program.
        programs_per_multiprocessor: As many as registers, shared memory and warps allow.
        occupancy: Share of the multiprocessor's warps that these are.
        instructions: How often each kind stands in the program's SASS (not: is executed). Loads
            and stores are those of global memory, per thread; copies go to shared memory on their
            own, boxes by the tensor memory accelerator. Asynchronous tensor cores are wgmma and
            tcgen05.
        programs: Size of the grid.
        elements: What the programs own: ``count`` where the kernel has one, else its result's
            elements (conv2d_weight_grad: of all partial sums).
        bytes: Size of the distinct tensors among the arguments.
        flops: Two per product of a convolution that its mathematics needs; padding's zeros count,
            incomplete tiles and the pixels between a transposed convolution's strides do not.
        instructions_per_element: Executed by all lanes, masked ones too, per element. Both sides
            of a branch count; out-of-line 64-bit divisions count once, not per call; iterations
            that the compiler peeled off a pipelined loop count twice.
        predicted_us: See the module.
        bound: Which term that is: "bytes", "instructions", "tensor cores" or "fp32 units".
    """

    layer: str
    direction: str
    kernel: str
    number: int
    stem: str
    dtype: str
    layout: str
    target: str
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs_per_multiprocessor: int
    occupancy: float
    instructions: dict[str, int]
    programs: int
    elements: int
    bytes: int
    flops: int
    instructions_per_element: float
    predicted_us: float
    bound: str

    @property
    def key(self) -> tuple[str, ...]:
        """What stays when the kernel changes."""
        launch = self.kernel if self.number == 1 else f"{self.kernel} #{self.number}"
        return self.layer, self.direction, launch, self.dtype, self.layout, self.target


@dataclass(frozen=True)
class CompileRecord:
    """All configurations, by one version of the compiler.

    Compilation is deterministic (all cubins are equal, byte for byte, between processes, hash
    seeds and empty caches), so records are compared exactly.
    """

    format: int
    triton: str
    kernels: list[CompiledKernel]


def record_path(triton_version: str) -> Path:
    return RESULTS / "compile" / f"triton-{triton_version}.json"


def programs_per_multiprocessor(gpu: Gpu, binary: Binary, num_warps: int) -> int:
    """Programs that one multiprocessor holds at a time."""
    # registers come in units of 256 per warp, from four files that serve a quarter of the warps
    warps = 4 * (gpu.registers // 4 // _round_up(binary.registers * WARP, 256))
    shared_bytes = _round_up(binary.shared_bytes + 1024, 128)  # 1 KiB belongs to the system
    limits = [
        gpu.programs,
        gpu.warps // num_warps,
        warps // num_warps,
        gpu.shared_bytes // shared_bytes,
    ]
    if binary.tensor_memory:
        limits.append(gpu.tensor_memory // binary.tensor_memory)
    return min(limits)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def predict(
    gpu: Gpu, dtype: str, tensor_cores: bool, size: int, warp_instructions: int, flops: int
) -> tuple[float, str]:
    """Predicted microseconds and the term that sets them; see the module."""
    if tensor_cores:
        unit, rate = "tensor cores", gpu.tf32_flops if dtype == "tf32" else gpu.half_flops
    else:
        unit, rate = "fp32 units", gpu.fp32_flops
    issued = gpu.multiprocessors * _WARP_INSTRUCTIONS_PER_CYCLE * gpu.clock
    seconds = {
        "bytes": size / gpu.copy_bytes,
        "instructions": warp_instructions / issued,
        unit: flops / rate,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return four_digits(seconds[bound] * 1e6), bound


def four_digits(number: float) -> float:
    """More would be noise in a record."""
    return float(f"{number:.4g}")


def _lost_width(kind: str) -> Callable[[CompiledKernel, CompiledKernel], bool]:
    def worse(old: CompiledKernel, new: CompiledKernel) -> bool:
        before, after = old.instructions, new.instructions
        return (
            after[f"{kind}_16_bytes"] < before[f"{kind}_16_bytes"]
            and after[f"{kind}_narrower"] > before[f"{kind}_narrower"]
        )

    return worse


# What makes a kernel worse, by figure; exchanged, what makes it better. Any other difference is a
# change, no judgement.
_WORSE: dict[str, Callable[[CompiledKernel, CompiledKernel], bool]] = {
    # registers cost nothing as long as as many programs fit
    "registers": lambda old, new: (
        new.registers > old.registers
        and new.programs_per_multiprocessor < old.programs_per_multiprocessor
    ),
    "spilled_bytes": lambda old, new: new.spilled_bytes > old.spilled_bytes,
    "occupancy": lambda old, new: new.occupancy < old.occupancy,
    "instructions.tensor_core": lambda old, new: (
        new.instructions["tensor_core"] == 0 < old.instructions["tensor_core"]
    ),
    "instructions.load_16_bytes": _lost_width("load"),
    "instructions.store_16_bytes": _lost_width("store"),
    "instructions_per_element": lambda old, new: (
        new.instructions_per_element > 1.01 * old.instructions_per_element
    ),
    "predicted_us": lambda old, new: new.predicted_us > 1.01 * old.predicted_us,
}


def differences(committed: Iterable[CompiledKernel], fresh: Iterable[CompiledKernel]) -> list[str]:
    """One line per launch that differs: each figure's old and new value, and if that is worse."""
    before = {kernel.key: kernel for kernel in committed}
    after = {kernel.key: kernel for kernel in fresh}
    lines = []
    for key in before | after:
        if key not in before:
            difference: str | None = "changed: not in the record"
        elif key not in after:
            difference = "changed: in the record, but no longer launched"
        else:
            difference = _difference(before[key], after[key])
        if difference:
            lines.append(f"{' '.join(key)}: {difference}")
    return lines


def _difference(old: CompiledKernel, new: CompiledKernel) -> str | None:
    before, after = _figures(old), _figures(new)
    changes, verdicts = [], set()
    for figure in before | after:
        was, now = before.get(figure), after.get(figure)
        if was != now:
            verdict = _verdict(figure, old, new)
            verdicts.add(verdict)
            note = "" if verdict == "changed" else f" ({verdict})"
            changes.append(f"{figure} {was} -> {now}{note}")
    if not changes:
        return None
    overall = next(verdict for verdict in ("worse", "better", "changed") if verdict in verdicts)
    return f"{overall}: {', '.join(changes)}"


def _verdict(figure: str, old: CompiledKernel, new: CompiledKernel) -> str:
    worse = _WORSE.get(figure)
    if worse is None:
        return "changed"
    return "worse" if worse(old, new) else "better" if worse(new, old) else "changed"


def _figures(kernel: CompiledKernel) -> dict[str, Any]:
    """All fields, those in dicts under ``field.name``."""
    figures: dict[str, Any] = {}
    for field, value in asdict(kernel).items():
        if isinstance(value, dict):
            figures |= {f"{field}.{name}": item for name, item in value.items()}
        else:
            figures[field] = value
    return figures


_COLUMNS = (
    "layer",
    "direction",
    "kernel",
    "registers",
    "spilled B",
    "shared B",
    "occupancy",
    "tensor core",
    "16-byte loads",
    "stores",
    "instructions/element",
    "predicted us",
    "bound",
)


def table(kernels: Iterable[CompiledKernel]) -> Iterator[str]:
    """Aligned lines under a heading per target, dtype and layout."""
    groups: dict[tuple[str, str, str], list[tuple[str, ...]]] = {}
    for kernel in kernels:
        group = groups.setdefault((kernel.target, kernel.dtype, kernel.layout), [_COLUMNS])
        group.append(_row(kernel))
    for (target, dtype, layout), rows in groups.items():
        yield f"{target} {dtype} {layout}; times are predicted, for {GPUS[target].name}"
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            names = (cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False))
            figures = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
            yield "  ".join((*names, *figures))
        yield ""


def _row(kernel: CompiledKernel) -> tuple[str, ...]:
    figures = (
        kernel.registers,
        kernel.spilled_bytes,
        kernel.shared_bytes,
        f"{kernel.occupancy:.0%}",
        kernel.instructions["tensor_core"],
        kernel.instructions["load_16_bytes"],
        kernel.instructions["store_16_bytes"],
        f"{kernel.instructions_per_element:.4g}",
        f"{kernel.predicted_us:.4g}",
        kernel.bound,
    )
    return (*kernel.key[:3], *map(str, figures))
