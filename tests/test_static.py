"""Every kernel that the ops ship compiles for GPUs that need not be here, within its budget.

What was compiled is compared with the committed record, so that the two stay the same.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from bench import static
from bench.compile_record import (
    GPUS,
    CompiledKernel,
    CompileRecord,
    differences,
    predict,
    programs_per_multiprocessor,
    record_path,
)
from bench.programs import Binary, Program, executed_instructions, read_code
from bench.record import FORMAT, RecordError, load, save

# What is compiled is compiled once.
pytestmark = pytest.mark.xdist_group("static")

ROOT = Path(__file__).parents[1]
MEMORY_BOUND = ("augment", "dropout", "linear", "lrn", "lrn_pool", "pool", "sgd")
# Instructions per element of the result that a kernel may take on sm_90, for fp16 and bf16 in
# channels_last, with channels that 8 divides; enough below what memory leaves time for.
INSTRUCTIONS = {
    "lrn_forward": 20,
    "lrn_backward": 40,
    "lrn_max_pool_forward": 120,
    "lrn_max_pool_backward": 56,
    "max_pool_forward": 90,  # triton 3.6 needs 67, 3.8 needs 87
    "max_pool_backward": 20,
    "sgd_step": 20,
    "augment_crops": 22,
}
# Kernels whose programs sum over pixels or rows, for which threads exchange through shared memory.
SUMMING = ("linear_epilogue_backward", "lrn_max_pool_backward")
RECORD, COMMITTED = record_path(triton.__version__), record_path("3.6.0")

COMPILE = """
import json, sys
from pathlib import Path
from bench.compile_record import CompileRecord
from bench.record import FORMAT, save
from bench.static import compile_kernels
kernels = [k for selection in json.loads(sys.argv[1]) for k in compile_kernels(*selection)]
save(CompileRecord(FORMAT, "", kernels), Path(sys.argv[2]))
"""


def run_apart(*arguments: str) -> str:
    """Standard output of another Python: interpreted kernels cannot be compiled."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def compile_apart(path: Path, *selections: tuple[Any, ...]) -> list[CompiledKernel]:
    """Compile selections: targets, dtypes, layouts, stems, whether with all candidates."""
    run_apart("-c", COMPILE, json.dumps(selections), str(path))
    return load(CompileRecord, path).kernels


@pytest.fixture(scope="module", params=["recorded", pytest.param("here", marks=pytest.mark.slow)])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[CompiledKernel]:
    """For sm_90, at least all in bf16 and channels_last, some more in fp16 and in NCHW.

    From the committed record, of which ``python -m bench static --check`` tells whether it is still
    what triton makes of them; or by the triton that is installed, which takes minutes.
    """
    if request.param == "recorded":
        return select(load(CompileRecord, COMMITTED).kernels, target="sm_90")
    return compile_apart(
        tmp_path_factory.mktemp("compiled") / "some.json",
        (["sm_90"], ["bf16"], ["nhwc"], static.STEMS, False),
        (["sm_90"], ["fp16"], ["nhwc"], MEMORY_BOUND),
        (["sm_90"], ["bf16"], ["nchw"], ["pool"]),
    )


@pytest.fixture(scope="module")
def bf16(compiled: list[CompiledKernel]) -> list[CompiledKernel]:
    return select(compiled, dtype="bf16", layout="nhwc")


@pytest.fixture(scope="module")
def half(compiled: list[CompiledKernel]) -> list[CompiledKernel]:
    """The memory-bound kernels in bf16 and fp16, channels_last."""
    return [
        k
        for k in compiled
        if k.stem in MEMORY_BOUND and k.layout == "nhwc" and k.dtype in ("bf16", "fp16")
    ]


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> list[CompiledKernel]:
    """For every GPU of the record, in half precision and channels_last."""
    path = tmp_path_factory.mktemp("compiled") / "generations.json"
    return compile_apart(path, (list(GPUS), ["bf16", "fp16"], ["nhwc"]))


def select(kernels: Iterable[CompiledKernel], **values: str) -> list[CompiledKernel]:
    """Those with these values of their fields; there must be some."""
    found = [k for k in kernels if all(getattr(k, name) == v for name, v in values.items())]
    assert found, values
    return found


def check_no_spills(kernels: list[CompiledKernel]) -> None:
    """In float32 two words may: what a compiler gives for one more program at a time.

    They are written and read once, beside the hundred words and more that such a thread loads.
    """
    allowed = {"fp32": 8, "tf32": 8}
    spilling = [
        (kernel.key, kernel.spilled_bytes)
        for kernel in kernels
        if kernel.spilled_bytes > allowed.get(kernel.dtype, 0)
    ]
    assert not spilling, spilling


def check_budget(kernels: list[CompiledKernel]) -> None:
    """Tensor cores (asynchronous since sm_90) that are fed by copies of 16 bytes or by boxes.

    In the memory-bound kernels accesses of 16 bytes.

    For fp16, bf16 in channels_last, with channels that 8 divides.
    """
    assert {kernel.stem for kernel in kernels} == set(static.STEMS)
    for kernel in kernels:
        counts = kernel.instructions
        if kernel.layer == "odd sgd":  # what is left when vectors do not fit
            continue
        if kernel.layer == "odd conv":  # and of convolutions
            assert kernel.kernel not in static.MULTIPLYING or counts["tensor_core"] > 0, kernel
        elif kernel.kernel in static.MULTIPLYING:
            asynchronous = counts["tensor_core_asynchronous"]
            assert counts["tensor_core"] > 0, kernel
            assert asynchronous == (0 if kernel.target == "sm_80" else counts["tensor_core"])
            # a single step is not worth a copy
            fed = [counts[name] for name in ("copy_16_bytes", "copy_boxes", "load_16_bytes")]
            assert any(fed), kernel
            assert counts["copy_narrower"] == 0, kernel
            assert kernel.programs_per_multiprocessor > 0, kernel
        elif kernel.stem in MEMORY_BOUND or kernel.kernel == "conv2d_epilogue_backward":
            # packed, neighbours in the result are three values apart in the mean
            assert counts["load_16_bytes"] > 0 or kernel.layer == "augment packed", kernel
            assert counts["store_16_bytes"] > 0, kernel


def check_recorded(kernels: list[CompiledKernel]) -> None:
    """Compare with the record of the same stems, targets, dtypes and layouts."""
    if not RECORD.exists():
        pytest.skip(
            f"no record for triton {triton.__version__}: python -m bench static --record makes one"
        )

    def group(kernel: CompiledKernel) -> tuple[Any, ...]:
        return kernel.stem, static.is_candidate(kernel.layer), *kernel.key[3:]

    compiled = set(map(group, kernels))
    record = load(CompileRecord, RECORD).kernels
    recorded = [kernel for kernel in record if group(kernel) in compiled]
    assert differences(recorded, kernels) == []


def test_sm_90_within_budget(bf16: list[CompiledKernel]) -> None:
    kernels = select(bf16, target="sm_90")
    check_budget(kernels)
    check_no_spills(kernels)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_memory_bound_kernels_within_their_instructions(
    half: list[CompiledKernel], dtype: str
) -> None:
    """On the paper's layers at batch 128; the measured values are in the record."""
    over: list[Any] = []
    for kernel, most in INSTRUCTIONS.items():
        made = select(half, kernel=kernel, dtype=dtype)
        paper = [k for k in made if not k.layer.startswith(("odd", "large"))]
        assert paper, kernel
        for k in paper:
            print(f"{k.layer} {kernel}: {k.instructions_per_element} of {most}")
        over += [k.key for k in paper if k.instructions_per_element > most]
    assert not over, over


def test_memory_bound_kernels_keep_to_registers(half: list[CompiledKernel]) -> None:
    for kernel in half:
        assert kernel.spilled_bytes == 0, kernel
        whole = kernel.layer.startswith("conv")  # which sums the bias gradient as well
        if kernel.kernel not in SUMMING or (kernel.stem == "lrn_pool" and not whole):
            assert kernel.shared_bytes == 0, kernel


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_compile_for_amd() -> None:
    stems = ("conv", *MEMORY_BOUND)
    output = run_apart("-m", "bench", "static", "gfx942", "--stems", *stems)
    assert output.startswith(f"gfx942: {', '.join(stems)} compiled")


def test_the_record_is_of_these_kernels(compiled: list[CompiledKernel]) -> None:
    check_recorded(compiled)


def test_nothing_spills_on_sm_90() -> None:
    """In any dtype or layout."""
    check_no_spills(select(load(CompileRecord, COMMITTED).kernels, target="sm_90"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_generation_within_budget(generations: list[CompiledKernel]) -> None:
    for target in GPUS:
        for dtype in ("bf16", "fp16"):
            kernels = select(generations, target=target, dtype=dtype, layout="nhwc")
            check_budget(kernels)
            check_no_spills([k for k in kernels if k.kernel in static.MULTIPLYING])


def test_the_budget_notices_scalar_accesses(compiled: list[CompiledKernel]) -> None:
    """The check can fail: NCHW pooling cannot use 16-byte accesses."""
    for kernel in select(compiled, layout="nchw", stem="pool"):
        assert kernel.instructions["load_16_bytes"] == 0
        assert kernel.instructions["load_narrower"] > 0


def test_pooling_takes_less_time_for_instructions_than_for_bytes(
    bf16: list[CompiledKernel],
) -> None:
    """Forward loads each tap once; backward loads each gradient and code of a cell once."""
    loads = {"max_pool_forward": (9, 0), "max_pool_backward": (4, 4)}
    for layer in ("pool1", "pool2", "pool5"):
        for kernel in select(bf16, target="sm_90", layer=layer):
            counts = kernel.instructions
            assert (counts["load_16_bytes"], counts["load_narrower"]) == loads[kernel.kernel]
            assert kernel.bound == "bytes"
            assert kernel.shared_bytes == 0


def test_every_kernel_is_recorded() -> None:
    written = {
        function.name
        for path in (*(ROOT / "kernels").glob("*.py"), ROOT / "bench" / "lrn_path.py")
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        and not function.name.startswith("_")
        and function.args.args[-1].arg == "INT64"  # what is launched, not what that calls
    }
    record = load(CompileRecord, record_path("3.6.0"))
    assert {kernel.kernel for kernel in record.kernels} == written


def test_launches_of_a_layer_have_different_keys(bf16: list[CompiledKernel]) -> None:
    assert len({kernel.key for kernel in bf16}) == len(bf16)
    backward = [k.key[2] for k in select(bf16, target="sm_90", layer="conv2", direction="backward")]
    assert backward == [
        "conv2d_epilogue_backward",
        "sum_partials",
        "conv2d",
        "conv2d_weight_grad",
        "sum_partials #2",
    ]


@pytest.mark.parametrize(
    ("layer", "kernel", "direction", "gigaflops", "megabytes"),
    [
        # as 3x3 taps of 48 channels, zeros included: 432 products where there are 363
        ("conv1", "conv2d", "forward", 32.1, 114.3),
        ("conv1", "conv2d_weight_grad", "backward", 32.1, None),
        ("conv2", "conv2d", "forward", 57.3, 66.3),
        ("conv2", "conv2d", "backward", 57.3, 66.3),
        ("conv2", "conv2d_weight_grad", "backward", 57.3, None),
        ("conv3", "conv2d", "forward", 38.3, 29.5),
        ("conv4", "conv2d", "backward", 28.7, 34.6),
        ("conv5", "conv2d", "forward", 19.1, 28.6),
        # three times the 74.34 MB of conv1's output, and partial sums of the bias
        ("conv1", "conv2d_epilogue_backward", "backward", 0, 223.2),
        # a byte in and two out for each of 19.27 million values, and the mean
        ("augment", "augment_crops", "forward", 0, 58.4),
        ("lrn1", "lrn_forward", "forward", 0, 148.7),
        ("lrn2", "lrn_forward", "forward", 0, 95.6),
        ("pool1", "max_pool_forward", "forward", 0, 101.2),
        ("pool1", "max_pool_backward", "backward", 0, 101.2),
        ("pool2", "max_pool_forward", "forward", 0, 64.4),
        ("pool5", "max_pool_backward", "backward", 0, 14.6),
        # its 1.05 MB are read and written in place
        ("fc6", "linear_epilogue", "forward", 0, 2.1),
        # 20 bytes for each of 60,965,224 parameters
        ("sgd", "sgd_step", "forward", 0, 1219.3),
    ],
)
def test_work_of_known_layers(
    bf16: list[CompiledKernel],
    layer: str,
    kernel: str,
    direction: str,
    gigaflops: float,
    megabytes: float | None,
) -> None:
    """At batch 128, as counted by hand; what a split sum writes depends on the splits."""
    for entry in select(bf16, layer=layer, kernel=kernel, direction=direction):
        assert round(entry.flops / 1e9, 1) == gigaflops
        assert megabytes is None or round(entry.bytes / 1e6, 1) == megabytes


def test_flops_of_a_strided_transposed_convolution(bf16: list[CompiledKernel]) -> None:
    """Of 7 rows 4 are reached by one tap and 3 by two; and so with columns."""
    forward, *backward = select(bf16, layer="odd conv", kernel="conv2d")
    assert forward.flops == 2 * (3 * 24 * 4 * 4) * (3 * 3 * 12)
    assert sum(part.flops for part in backward) == 2 * (3 * 24) * (4 + 2 * 3) ** 2 * 12


# LDG.E.128 and FFMA are run as often as the loop, all else once
CODE = [
    "MOV R1, R2",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "@!P1 FFMA R4, R4, R5, R4",
    "@P0 BRA 1",
    "@!PT LDS RZ, [RZ]",
    "STG.E.64 desc[UR4][R2.64], R4",
    "@P2 MUFU.RCP R4, R5",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR12], R16",
    "@!P2 BRA 9",
    "BRA 4",
    "BRA 12",
    "NOP",
]


def program(code: Sequence[str]) -> Program:
    return Program(Binary(b"", 32, 0, 0, 0), *read_code(code))


def test_instructions_of_a_program() -> None:
    counts, loops = read_code(CODE)
    assert loops == (3,)
    assert counts == {
        "total": 12,
        "tensor_core": 1,
        "tensor_core_asynchronous": 1,
        "load_16_bytes": 1,
        "load_narrower": 0,
        "copy_16_bytes": 0,
        "copy_narrower": 0,
        "copy_boxes": 0,
        "store_16_bytes": 0,
        "store_narrower": 1,
        "special_function": 1,
        "local_memory": 0,
    }


def test_loops_are_run_as_often_as_their_trips_say() -> None:
    assert executed_instructions("kernel", program(CODE), (5,)) == 12 + 4 * 3
    twice = ["FADD", "BRA 0", "FADD", "FMUL", "@P0 BRA 2", "EXIT", "BRA 6"]
    assert executed_instructions("kernel", program(twice), (10,)) == 10 * 2 + 10 * 3 + 1
    assert executed_instructions("kernel", program(twice), (10, 0)) == 10 * 2 + 1


@pytest.mark.parametrize(
    ("trips", "message"),
    [(None, "kernel has 1 loops but no entry"), ((1, 2), "kernel has 1 loops, its entry .* 2")],
)
def test_a_loop_needs_trips(trips: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        executed_instructions("kernel", program(CODE), trips)


def test_a_loop_within_a_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="a loop within a loop"):
        read_code(["FADD", "FADD", "@P0 BRA 1", "@P1 BRA 0", "EXIT", "BRA 5"])


@pytest.mark.parametrize(
    ("binary", "num_warps", "programs"),
    [
        (Binary(b"", 32, 0, 0, 0), 4, 16),  # 64 warps
        (Binary(b"", 128, 0, 0, 0), 8, 2),  # 65536 registers
        (Binary(b"", 129, 0, 0, 0), 8, 1),
        (Binary(b"", 32, 0, 49152, 0), 4, 4),  # 228 KiB, 1 KiB per program more
        (Binary(b"", 16, 0, 0, 0), 1, 32),
        (Binary(b"", 32, 0, 0, 256), 4, 2),  # 512 columns
    ],
)
def test_programs_that_a_multiprocessor_holds(
    binary: Binary, num_warps: int, programs: int
) -> None:
    assert programs_per_multiprocessor(GPUS["sm_100"], binary, num_warps) == programs


@pytest.mark.parametrize(
    ("dtype", "tensor_cores", "size", "instructions", "flops", "prediction"),
    [
        ("bf16", True, 4_300_000, 0, 0, (1.0, "bytes")),
        ("bf16", True, 0, 132 * 4 * 1980 * 2, 0, (2.0, "instructions")),
        ("bf16", True, 0, 0, 790_000_000, (1.0, "tensor cores")),
        ("tf32", True, 0, 0, 790_000_000, (2.0, "tensor cores")),
        ("fp32", False, 0, 0, 67_000_000, (1.0, "fp32 units")),
    ],
)
def test_prediction(
    dtype: str, tensor_cores: bool, size: int, instructions: int, flops: int, prediction: Any
) -> None:
    assert predict(GPUS["sm_90"], dtype, tensor_cores, size, instructions, flops) == prediction


KERNEL = CompiledKernel(
    layer="conv2",
    direction="forward",
    kernel="conv2d",
    number=1,
    stem="conv",
    dtype="bf16",
    layout="nhwc",
    target="sm_90",
    blocks={"BLOCK_M": 128},
    num_warps=8,
    num_stages=3,
    registers=120,
    spilled_bytes=8,
    shared_bytes=49152,
    programs_per_multiprocessor=2,
    occupancy=0.25,
    instructions={
        "tensor_core": 2,
        "load_16_bytes": 8,
        "load_narrower": 4,
        "store_16_bytes": 8,
        "store_narrower": 4,
    },
    programs=100,
    elements=1000,
    bytes=2000,
    flops=3000,
    instructions_per_element=100.0,
    predicted_us=10.0,
    bound="tensor cores",
)
NAME = "conv2 forward conv2d bf16 nhwc sm_90"


def changed(**figures: Any) -> CompiledKernel:
    """KERNEL with other figures; those of instructions by their own names."""
    counts = {name: v for name, v in figures.items() if name in KERNEL.instructions}
    others = {name: v for name, v in figures.items() if name not in counts}
    return replace(KERNEL, **others, instructions=KERNEL.instructions | counts)


def test_equal_records_have_no_differences() -> None:
    assert differences([KERNEL], [replace(KERNEL)]) == []


@pytest.mark.parametrize(
    ("figures", "difference"),
    [
        (
            {"registers": 130, "programs_per_multiprocessor": 1},
            "registers 120 -> 130 (worse), programs_per_multiprocessor 2 -> 1",
        ),
        ({"spilled_bytes": 12}, "spilled_bytes 8 -> 12 (worse)"),
        ({"occupancy": 0.125}, "occupancy 0.25 -> 0.125 (worse)"),
        ({"tensor_core": 0}, "instructions.tensor_core 2 -> 0 (worse)"),
        (
            {"load_16_bytes": 4, "load_narrower": 36},
            "instructions.load_16_bytes 8 -> 4 (worse), instructions.load_narrower 4 -> 36",
        ),
        (
            {"store_16_bytes": 0, "store_narrower": 8},
            "instructions.store_16_bytes 8 -> 0 (worse), instructions.store_narrower 4 -> 8",
        ),
        ({"instructions_per_element": 102.0}, "instructions_per_element 100.0 -> 102.0 (worse)"),
        ({"predicted_us": 10.2}, "predicted_us 10.0 -> 10.2 (worse)"),
    ],
)
def test_what_is_worse(figures: dict[str, Any], difference: str) -> None:
    """And, the other way round, better."""
    new = changed(**figures)
    assert differences([KERNEL], [new]) == [f"{NAME}: worse: {difference}"]
    (back,) = differences([new], [KERNEL])
    assert back.startswith(f"{NAME}: better: ")
    assert "worse" not in back


@pytest.mark.parametrize(
    ("figures", "difference"),
    [
        ({"registers": 122}, "registers 120 -> 122"),
        ({"tensor_core": 1}, "instructions.tensor_core 2 -> 1"),
        ({"load_16_bytes": 4}, "instructions.load_16_bytes 8 -> 4"),
        ({"instructions_per_element": 100.9}, "instructions_per_element 100.0 -> 100.9"),
        ({"predicted_us": 10.05}, "predicted_us 10.0 -> 10.05"),
        ({"blocks": {"BLOCK_N": 1}}, "blocks.BLOCK_M 128 -> None, blocks.BLOCK_N None -> 1"),
    ],
)
def test_what_is_a_change_only(figures: dict[str, Any], difference: str) -> None:
    assert differences([KERNEL], [changed(**figures)]) == [f"{NAME}: changed: {difference}"]


def test_worse_outweighs_better() -> None:
    (line,) = differences([KERNEL], [changed(spilled_bytes=0, predicted_us=20.0)])
    assert line == (
        f"{NAME}: worse: spilled_bytes 8 -> 0 (better), predicted_us 10.0 -> 20.0 (worse)"
    )


def test_new_and_lost_launches_are_differences() -> None:
    assert differences([KERNEL], []) == [f"{NAME}: changed: in the record, but no longer launched"]
    assert differences([KERNEL], [KERNEL, replace(KERNEL, number=2)]) == [
        "conv2 forward conv2d #2 bf16 nhwc sm_90: changed: not in the record"
    ]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where --check looks for the record; what it compiles is KERNEL with 120 registers."""
    path = tmp_path / "triton.json"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(static, "record_path", lambda version: path)
    monkeypatch.setattr(static, "compile_kernels", lambda **selection: [KERNEL])
    return path


def test_check_passes_equal_kernels(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(KERNEL, target="sm_80")  # is not asked for
    save(CompileRecord(FORMAT, "", [KERNEL, other]), record)
    assert static.main(["--check", "sm_90"]) == 0
    assert capsys.readouterr().out == "1 kernels are as in triton.json\n"


def test_check_fails_changed_kernels(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(CompileRecord(FORMAT, "", [changed(spilled_bytes=0)]), record)
    assert static.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{NAME}: worse: spilled_bytes 0 -> 8 (worse)",
        "1 of 1 kernels are not as in triton.json.",
        "If that is intended: python -m bench static --record, and commit the result.",
    ]


def test_check_needs_a_record(record: Path) -> None:
    with pytest.raises(RecordError, match=f"no record for triton {triton.__version__}"):
        static.main(["--check"])


def test_a_record_is_checked_and_kept(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert static.main(["--record"]) == 0
    assert load(CompileRecord, record).kernels == [KERNEL]
    assert static.main(["--check"]) == 0


def test_the_table_is_aligned(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert static.main([]) == 0
    heading, names, figures, _ = capsys.readouterr().out.split("\n", 3)
    assert heading == "sm_90 bf16 nhwc; times are predicted, for H200"
    assert len(names) == len(figures)
    assert names.split()[:4] == ["layer", "direction", "kernel", "registers"]
    assert figures.split()[:4] == ["conv2", "forward", "conv2d", "120"]


@pytest.mark.parametrize("arguments", [["sm_75"], ["--check", "gfx942"], ["--record", "sm_90"]])
def test_unknown_selections_are_refused(record: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        static.main(arguments)
    assert refusal.value.code == 2
