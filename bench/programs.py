"""Compile kernels without a GPU, and count what stands in the programs that come out.

Loops are counted by their trips, which the caller knows; everything else is read from the code.
"""

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from alexkern.runtime.launch import Launch, underlying

WARP = 32
_TYPES = {
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
_INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Compilation:
    """What Triton needs to know to compile a kernel."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    divisible: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def stem(self) -> str:
        """The module's last name."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class Binary:
    """Machine code, with registers and local memory per thread, and what a program allocates.

    ``tensor_memory`` is in columns, 0 on GPUs without.
    """

    code: bytes
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory: int


@dataclass(frozen=True)
class Program:
    """A binary, and what stands in its code.

    Attributes:
        binary: The program.
        instructions: Number of each kind; see :class:`bench.compile_record.CompiledKernel`.
        loops: Number of instructions in each loop's body, in the code's order.
    """

    binary: Binary
    instructions: dict[str, int]
    loops: tuple[int, ...]


def compilation(launch: Launch) -> Compilation:
    """What a launch compiles: types and alignment as Triton's launcher derives them."""
    signature, divisible, constants = [], [], dict(launch.constants)
    for parameter, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature.append((parameter, "*" + _TYPES[value.dtype]))
            # an allocation is aligned to more than 16 bytes, a view of it perhaps not
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(parameter)
        elif underlying(value) is not value:
            box = f"{_TYPES[value.base.dtype]}{list(value.block_shape)}"
            signature.append((parameter, f"tensordesc<{box}>"))
        elif isinstance(value, float):
            signature.append((parameter, "fp32"))
        elif value == 1:
            constants[parameter] = 1
        else:
            signature.append((parameter, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(parameter)
    return Compilation(
        launch.kernel.__module__,
        launch.kernel.__name__,
        tuple(signature),
        tuple(divisible),
        tuple(constants.items()),
        tuple(launch.options.items()),
    )


Job = tuple[Compilation, str]  # and the target


def compile_programs(jobs: Iterable[Job]) -> dict[Job, Program]:
    """Compile on all cores, each distinct job once. AMD's targets are compiled and left out."""
    distinct = list(dict.fromkeys(jobs))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(_compile, *zip(*distinct, strict=True)))
    by_target: dict[str, dict[Job, Binary]] = {}
    for job, binary in zip(distinct, binaries, strict=True):
        if binary:
            by_target.setdefault(job[1], {})[job] = binary
    programs = {}
    for target, compiled in by_target.items():
        codes = _disassemble(target, [binary.code for binary in compiled.values()])
        for (job, binary), code in zip(compiled.items(), codes, strict=True):
            programs[job] = Program(binary, *read_code(code))
    return programs


def _compile(kernel: Compilation, target: str) -> Binary | None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(kernel.module), kernel.kernel)
    types = dict(kernel.signature)
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs=dict(kernel.constants),
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if name in kernel.divisible
        },
    )
    options = dict(kernel.options)
    if not target.startswith("sm_"):
        triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
        return None
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), WARP)
    compiled = triton.compile(source, target=gpu, options=options)
    cubin = compiled.asm["cubin"]
    usage = _run_tool("cuobjdump", cubin, "-res-usage")
    registers, stack, local = (
        int(re.search(rf"{field}:(\d+)", usage)[1])  # type: ignore[index]
        for field in ("REG", "STACK", "LOCAL")
    )
    return Binary(
        code_section(cubin),
        registers,
        stack + local,
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def _run_tool(name: str, content: bytes, *options: str) -> str:
    """Output of one of the tools that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_section(cubin: bytes) -> bytes:
    """The one section of an ELF file that holds a kernel's machine code."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names_index = struct.unpack_from("<HH", cubin, 0x3C)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    names = sections[names_index][4]
    (code,) = (
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


def _disassemble(target: str, codes: Sequence[bytes]) -> Iterator[list[str]]:
    """Each code's instructions. All at once, since the disassembler is slow to start."""
    option = target.replace("sm_", "SM")
    text = _run_tool("nvdisasm", b"".join(codes), "--binary", option)
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;", text)
    if [int(address, 16) for address, _ in found] != list(
        range(0, sum(map(len, codes)), _INSTRUCTION_BYTES)
    ):
        raise ValueError("the disassembler's output is not one instruction for every 16 bytes")
    start = 0
    for code in codes:
        end = start + len(code) // _INSTRUCTION_BYTES
        yield [_relative(instruction, start) for _, instruction in found[start:end]]
        start = end


def _relative(instruction: str, start: int) -> str:
    """A branch's target as the number of an instruction of its own program."""
    branch = re.match(r"(.*\bBRA\b.*)\b0x([0-9a-f]+)$", instruction)
    if not branch:
        return instruction
    return f"{branch[1]}{int(branch[2], 16) // _INSTRUCTION_BYTES - start}"


def read_code(code: Sequence[str]) -> tuple[dict[str, int], tuple[int, ...]]:
    """Count a program's instructions, and those in the body of each of its loops.

    Args:
        code: Instructions, with targets of branches as numbers of instructions.

    Raises:
        ValueError: loops within loops, whose trips could not be told.
    """
    operations = [re.sub(r"^@\S+ +", "", instruction) for instruction in code]
    branches = [  # from, to
        (index, int(operation.split()[-1]))
        for index, operation in enumerate(operations)
        if re.match(r"BRA\b", operation)
    ]
    # a branch to itself ends the code; what follows only fills the last cache line
    end = max((index for index, target in branches if index == target), default=len(code))
    loops = list(_loops(operations, branches))
    for (_, last), (first, _) in pairwise(loops):
        if first <= last:
            raise ValueError("a loop within a loop: only simple loops are counted")
    return _count(operations[:end]), tuple(last - first + 1 for first, last in loops)


def _loops(
    operations: Sequence[str], branches: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """First and last instruction of each loop of the main program.

    Behind its last EXIT lie subroutines and barriers' waits. Waits are no loops of the program;
    the one for tensor memory goes round only if there is none left.
    """
    last_exit = max(index for index, operation in enumerate(operations) if operation == "EXIT")
    for index, target in branches:
        waits = any(o.startswith("UTCATOMSWS") for o in operations[target : index + 1])
        if target < index < last_exit and not waits:
            yield target, index


def _count(operations: Sequence[str]) -> dict[str, int]:
    counts = {
        "total": len(operations),
        "tensor_core": 0,
        "tensor_core_asynchronous": 0,
        "load_16_bytes": 0,
        "load_narrower": 0,
        "copy_16_bytes": 0,
        "copy_narrower": 0,
        "copy_boxes": 0,
        "store_16_bytes": 0,
        "store_narrower": 0,
        "special_function": 0,
        "local_memory": 0,
    }
    kinds = {"LDG": "load", "LDGSTS": "copy", "STG": "store", "UTMALDG": "copy_boxes"}
    kinds |= {"MUFU": "special_function", "LDL": "local_memory", "STL": "local_memory"}
    for operation in operations:
        name, *qualifiers = operation.split()[0].split(".")
        kind = "tensor_core" if name.endswith("MMA") else kinds.get(name)
        if kind == "tensor_core" and name.startswith(("HGMMA", "UTC")):
            counts["tensor_core_asynchronous"] += 1
        if kind in ("load", "copy", "store"):
            kind += "_16_bytes" if {"128", "256"} & set(qualifiers) else "_narrower"
        if kind:
            counts[kind] += 1
    return counts


def executed_instructions(kernel: str, program: Program, trips: tuple[int, ...] | None) -> int:
    """Instructions that each warp executes.

    Both sides of a branch count, a subroutine once however often it is called, and what the
    compiler peeled off a pipelined loop in addition to all of the loop's trips.

    Args:
        kernel: Its name.
        program: Compiled.
        trips: Of each loop in the program, or one number if all make as many; None if nobody
            said.

    Raises:
        ValueError: loops and no trips, or another number of them.
    """
    total, loops = program.instructions["total"], program.loops
    if not loops:
        return total
    if trips is None:
        raise ValueError(
            f"{kernel} has {len(loops)} loops but no entry in bench.static.TRIPS to say how often "
            "they are run"
        )
    if len(trips) == 1:
        trips *= len(loops)
    if len(trips) != len(loops):
        raise ValueError(
            f"{kernel} has {len(loops)} loops, its entry in bench.static.TRIPS is for {len(trips)}"
        )
    return total + sum(body * (trip - 1) for body, trip in zip(loops, trips, strict=True))
