"""Compile every kernel as the ops launch it, for GPUs that this machine need not have.

    python -m bench.static sm_90            # a table; --json for one JSON object per kernel

The ops run on meta tensors with launches recorded instead of made, so what is compiled is
exactly what a GPU would be asked for: types, alignment, constants, warps and stages. Registers,
spills and instructions are read from the result with the tools that come with Triton.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import alexkern.ops as ops
from alexkern import use_backend
from alexkern.runtime.launch import Launch, record_launches
from bench.layers import BATCH, CONVOLUTIONS, DROPOUTS, NORMALISED, POOLS

# not in the paper: channels, and elements in the batch, that 8 divides and 16 does not
ODD = (24, 7, 7)
_ODD_BATCH = 3
# so many images that offsets need 64 bits
_LARGE_BATCH = 2**15

# tf32 is float32 under torch's switch of that name
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Job:
    """One kernel to compile: the layer that launches it, and what Triton needs to know."""

    name: str
    stem: str
    kernel: str
    dtype: str
    layout: str
    signature: tuple[tuple[str, str], ...]
    divisible: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]


def jobs(dtype: str, layout: str, stems: Sequence[str] = ()) -> list[Job]:
    """The distinct kernels of AlexNet's layers, forward and backward, at batch 128."""
    found: dict[Job, Job] = {}
    for name, call in _layers(dtype, layout):
        with record_launches() as launches, use_backend("triton"), _fp32_precision(dtype):
            output = call()
            output.backward(torch.empty_like(output))
        for launch in launches:
            job = _job(name, launch, dtype, layout)
            if not stems or job.stem in stems:
                found.setdefault(_unnamed(job), job)
    return list(found.values())


@contextmanager
def _fp32_precision(dtype: str) -> Iterator[None]:
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _unnamed(job: Job) -> Job:
    return Job("", *list(asdict(job).values())[1:])


def _layers(dtype: str, layout: str) -> Iterator[tuple[str, Any]]:
    """Each layer's name, and a call of its op on meta tensors."""
    memory_format = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}[layout]

    def tensor(*shape: int) -> torch.Tensor:
        result = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        if len(shape) == 4:
            result = result.to(memory_format=memory_format)
        return result.requires_grad_()

    def convolution(batch: int, shape: tuple[int, ...], *geometry: Any) -> Any:
        channels, kernel, stride, padding, groups = geometry
        image = tensor(batch, *shape).requires_grad_(shape[0] > 3)  # conv1 learns no image
        weight = tensor(channels, shape[0] // groups, kernel, kernel)
        arguments = image, weight, tensor(channels), stride, padding, 1, groups
        return lambda: ops.conv2d_bias_relu(*arguments)

    def normalisation(*shape: int) -> Any:
        return lambda: ops.local_response_norm(tensor(*shape), 5, 1e-4, 0.75, 2.0, "sum")

    def pooling(*shape: int) -> Any:
        return lambda: ops.max_pool2d(tensor(*shape), 3, 2)

    def dropping(*shape: int, **place: int) -> Any:
        return lambda: ops.dropout(tensor(*shape), **place)

    for name, layer in CONVOLUTIONS.items():
        yield name, convolution(BATCH, *layer)
    for number, shape in POOLS.items():
        if number in NORMALISED:
            yield f"lrn{number}", normalisation(BATCH, *shape)
        yield f"pool{number}", pooling(BATCH, *shape)
    for number, shape in DROPOUTS.items():
        yield f"dropout{number}", dropping(BATCH, *shape)
        yield f"dropout{number} shard", dropping(BATCH, shape[0] // 2, row_stride=shape[0])
    for name, batch, shape in (
        ("odd", _ODD_BATCH, ODD),
        ("large", _LARGE_BATCH, CONVOLUTIONS["conv2"][0]),
    ):
        yield f"{name} conv", convolution(batch, shape, shape[0], 3, 2, 1, 2)
        yield f"{name} lrn", normalisation(batch, *shape)
        yield f"{name} pool", pooling(batch, *shape)
        yield f"{name} dropout", dropping(batch, *shape)


def _job(name: str, launch: Launch, dtype: str, layout: str) -> Job:
    """Types and alignment as Triton's own launcher derives them from the arguments."""
    signature, divisible, constants = [], [], dict(launch.constants)
    for parameter, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            types = {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
            types |= {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
            signature.append((parameter, "*" + types[value.dtype]))
            divisible.append(parameter)  # fresh allocations are aligned to more than 16 bytes
        elif isinstance(value, float):
            signature.append((parameter, "fp32"))
        elif value == 1:
            constants[parameter] = 1
        else:
            signature.append((parameter, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(parameter)
    stem = launch.kernel.__module__.rpartition(".")[2]
    return Job(
        name,
        stem,
        launch.kernel.__name__,
        dtype,
        layout,
        tuple(signature),
        tuple(divisible),
        tuple(constants.items()),
        tuple(launch.options.items()),
    )


def compile_job(job: Job, target: str) -> dict[str, Any]:
    """Compile for ``target`` and report: name, registers, spills, shared bytes, instructions.

    ``spilled_bytes`` is what a thread keeps in local memory; ``instructions`` counts
    tensor-core instructions, 16-byte global loads and stores (asynchronous copies included).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from alexkern.runtime.launch import device_code

    function = getattr(device_code(job.stem), job.kernel)
    types = dict(job.signature)
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs=dict(job.constants),
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if name in job.divisible
        },
    )
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    compiled = triton.compile(source, target=gpu, options=dict(job.options))
    report = {
        "name": f"{job.name} {job.kernel}",
        "target": target,
        "dtype": job.dtype,
        "layout": job.layout,
        "stem": job.stem,
        "kernel": job.kernel,
        "constants": {name: value for name, value in job.constants if name.startswith("BLOCK")},
        "shared_bytes": compiled.metadata.shared,
    }
    if target.startswith("sm_"):
        report |= _read_cubin(compiled)
    return report


_INSTRUCTIONS = {
    "tensor_core": r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma",
    "load_16_bytes": r"ld\.global\S*\.v4\.[bfu]32|ld\.global\S*\.v2\.[bfu]64"
    r"|cp\.async\.c[ga]\.shared\.global[^;]*?, (?:0x10|16)\b",
    "store_16_bytes": r"st\.global\S*\.v4\.[bfu]32|st\.global\S*\.v2\.[bfu]64",
}


def _read_cubin(compiled: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{field}:(\d+)", usage)[1])  # type: ignore[index]
        for field in ("REG", "STACK", "LOCAL")
    )
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "instructions": {name: len(re.findall(p, ptx)) for name, p in _INSTRUCTIONS.items()},
    }


def compile_all(work: Sequence[tuple[Job, str]]) -> list[dict[str, Any]]:
    """Compile (job, target) pairs on all cores, in order."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_job, *zip(*work, strict=True)))


def main() -> None:
    """Command line: targets, dtypes and layouts to compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("targets", nargs="*", default=["sm_90"], help=", ".join(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", default=["nhwc"], choices=["nhwc", "nchw"])
    parser.add_argument("--stems", nargs="+", default=[], help="conv, lrn, pool, dropout")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    work = [
        (job, target)
        for target in arguments.targets
        for dtype in arguments.dtypes
        for layout in arguments.layouts
        for job in jobs(dtype, layout, arguments.stems)
    ]
    for report in compile_all(work):
        if arguments.json:
            print(json.dumps(report))
        else:
            counts = report.get("instructions", {})
            print(
                f"{report['name']:36s} {report['target']:7s} {report['dtype']} {report['layout']} "
                f"{report.get('registers', '-'):>4} registers "
                f"{report.get('spilled_bytes', '-'):>4} B spilled "
                f"{report['shared_bytes']:>6} B shared  "
                + " ".join(f"{name}={count}" for name, count in counts.items())
            )


if __name__ == "__main__":
    main()
