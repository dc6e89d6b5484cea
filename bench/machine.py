"""The machine that a record is made on: names, versions, clocks and measured limits."""

import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alexkern.runtime.timing import Call, Program, sample, side_stream
from bench.record import FORMAT, Ceilings, Clocks, Machine, Record, RecordError, Settings, load

# tf32 is float32 under torch's switch of that name
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}
_COPY_BYTES = 2**31
_MATMUL_SIZE = 8192


def describe() -> Machine:
    """The current GPU, or the CPU where there is none, and the versions of what runs on it."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties() if gpu else None
    major, minor = torch.cuda.get_device_capability() if gpu else (0, 0)
    return Machine(
        gpu=properties.name if properties else "",
        capability=f"sm_{major}{minor}" if gpu else "",
        driver=_nvidia_smi("driver_version")[0] if gpu else "",
        multiprocessors=properties.multi_processor_count if properties else 0,
        memory_bytes=properties.total_memory if properties else 0,
        l2_bytes=properties.L2_cache_size if properties else 0,
        cpu=platform.processor() or platform.machine(),
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton_version,
        cuda=torch.version.cuda or "",
        cudnn=str(torch.backends.cudnn.version() or ""),
    )


def settings() -> Settings:
    """Torch's switches as they stand."""
    return Settings(
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def clocks() -> Clocks | None:
    """The GPU's state now; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    sm, memory, power, temperature, reasons = _nvidia_smi(
        "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active"
    )
    return Clocks(_number(sm), _number(memory), _number(power), _number(temperature), reasons)


def _number(text: str) -> float:
    """Zero for what the driver does not tell ("[N/A]")."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _nvidia_smi(*fields: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        index = str(torch.cuda.current_device())
        output = subprocess.run([*command, "-i", index], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [""] * len(fields)
    return [value.strip() for value in output.stdout.strip().split(",")]


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float32 products in TF32 if ``dtype`` is ``"tf32"``, in full precision otherwise."""
    wanted = "tf32" if dtype == "tf32" else "ieee"
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolution.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    _set_precision(wanted, wanted)
    try:
        yield
    finally:
        _set_precision(*before)


def _set_precision(convolution: str, matmul: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = convolution  # type: ignore[attr-defined]
    # Inductor asks by the name of before, and raises if the new one was used.
    torch.set_float32_matmul_precision("high" if matmul == "tf32" else "highest")


def tf32_allowed() -> bool:
    """Whether float32 convolutions may use TF32 now."""
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(switch.fp32_precision == "tf32")


def ceilings(device: torch.device, dtypes: Sequence[str]) -> Ceilings:
    """What the machine's memory and matrix units reach now, on random data.

    The copy moves 2 GiB each way; the product is square with sides of 8192. Both are small on a
    CPU, where they only try the program.
    """
    gpu = device.type == "cuda"
    rates = {}
    for dtype in dtypes:
        with precision(dtype):
            rates[dtype] = _matmul_rate(_MATMUL_SIZE if gpu else 128, DTYPES[dtype], device)
    return Ceilings(_copy_rate(_COPY_BYTES if gpu else 2**20, device), rates)


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device)


def _matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: left @ right, device)


def _median_seconds(call: Call, device: torch.device) -> float:
    with side_stream(device):
        return statistics.median(sample({"": Program([call], device)}, device)[""])


def commit() -> str:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it.

    A copy without its repository takes it from ``ALEXKERN_COMMIT``.
    """
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=9", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ALEXKERN_COMMIT", "unknown")


def folder_name(machine: Machine) -> str:
    """``"NVIDIA H200"`` as ``"nvidia-h200"``; ``"cpu"`` without a GPU."""
    return "-".join(machine.gpu.lower().split()) or "cpu"


def open_record(results: Path, device: torch.device, dtypes: Sequence[str]) -> tuple[Record, Path]:
    """The record of this machine, commit and day in ``results``: that of an earlier run, or new.

    Its ceilings are measured now. Sets torch's switches as all benchmarks want them.

    Raises:
        RecordError: The file is there and is no record, or was made with other versions.
    """
    torch.backends.cudnn.benchmark = True  # cuDNN searches for its fastest algorithm
    machine, date = describe(), datetime.date.today().isoformat()
    path = results / folder_name(machine) / f"{date}-{commit()}.json"
    record = Record(FORMAT, date, commit(), machine, settings(), ceilings(device, dtypes))
    if path.exists():
        earlier = load(Record, path)
        if earlier.machine != machine:
            raise RecordError(f"{path} was made on {earlier.machine}, this is {machine}")
        record.measurements, record.tests = earlier.measurements, earlier.tests
        rates = record.ceilings.matmul_flops_per_second
        rates |= earlier.ceilings.matmul_flops_per_second | dict(rates)
    return record, path
