"""Every kernel that the ops ship compiles for GPUs that need not be here, within its budget."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
MEMORY_BOUND = ("lrn", "pool", "dropout")


def compile_kernels(*arguments: str) -> list[dict[str, Any]]:
    """Reports of `python -m bench.static`; apart, as interpreted kernels cannot be compiled."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check_no_spills(reports: list[dict[str, Any]]) -> None:
    spilling = [report for report in reports if report["spilled_bytes"]]
    assert not spilling, spilling


def check_budget(reports: list[dict[str, Any]]) -> None:
    """Tensor cores in the convolutions, 16-byte accesses in the memory-bound kernels.

    For fp16, bf16 in channels_last, with channels that 8 divides.
    """
    assert {report["stem"] for report in reports} == {"conv", *MEMORY_BOUND}
    for report in reports:
        counts = report["instructions"]
        if report["kernel"] in ("conv2d", "conv2d_weight_grad"):
            assert counts["tensor_core"] > 0, report
        elif report["stem"] in MEMORY_BOUND or report["kernel"] == "conv2d_epilogue_backward":
            assert counts["load_16_bytes"] > 0, report
            assert counts["store_16_bytes"] > 0, report


def test_sm_90_within_budget() -> None:
    reports = compile_kernels("sm_90", "--dtypes", "bf16")
    check_budget(reports)
    check_no_spills(reports)


def test_sm_90_float32_does_not_spill() -> None:
    check_no_spills(compile_kernels("sm_90", "--dtypes", "fp32", "tf32"))


def test_sm_90_nchw_does_not_spill() -> None:
    check_no_spills(compile_kernels("sm_90", "--dtypes", "bf16", "--layouts", "nchw"))


def test_other_generations_compile() -> None:
    reports = compile_kernels("sm_80", "sm_100", "--dtypes", "bf16")
    for target in ("sm_80", "sm_100"):
        check_budget([report for report in reports if report["target"] == target])


def test_memory_bound_kernels_compile_for_amd() -> None:
    reports = compile_kernels("gfx942", "--stems", *MEMORY_BOUND)
    assert {report["stem"] for report in reports} == set(MEMORY_BOUND)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_dtype_layout_and_generation() -> None:
    dtypes, layouts = ["bf16", "fp16", "fp32", "tf32"], ["nhwc", "nchw"]
    targets = ["sm_80", "sm_90", "sm_100"]
    reports = compile_kernels(*targets, "--dtypes", *dtypes, "--layouts", *layouts)
    check_no_spills([report for report in reports if report["target"] == "sm_90"])
    for target in targets:
        for dtype in ("bf16", "fp16"):
            key = {"target": target, "dtype": dtype, "layout": "nhwc"}
            check_budget([r for r in reports if all(r[name] == key[name] for name in key)])


def test_the_budget_notices_scalar_accesses() -> None:
    """The check can fail: NCHW pooling cannot use 16-byte accesses."""
    reports = compile_kernels("sm_90", "--layouts", "nchw", "--stems", "pool")
    assert all(report["instructions"]["load_16_bytes"] == 0 for report in reports)
