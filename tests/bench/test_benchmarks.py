"""`pytest bench/` as a user runs it, tried on a CPU with tiny layers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.record import Record, load

ROOT = Path(__file__).parents[2]


def _inherited() -> dict[str, str]:
    """Without what tells that this test runs beside others, for which benchmarks stand aside."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


def bench(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**_inherited(), **environment}
    )


def the_record(results: Path) -> Any:
    (path,) = results.glob("cpu/*.json")
    return load(Record, path)


def test_variants_are_compared_recorded_and_shown_by_pytest_benchmark(tmp_path: Path) -> None:
    run = bench(
        "bench/bench_pool.py",
        "--benchmark-only",
        "--trial",
        f"--results={tmp_path}",
        f"--benchmark-json={tmp_path}/benchmark.json",
        "-k5 and forward",
    )
    assert run.returncode == 0, run.stdout
    measured = {m.key.variant: m for m in the_record(tmp_path).measurements}
    assert set(measured) == {"alexkern", "eager_nchw", "eager_channels_last", "compile"}
    shown = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert {entry["group"] for entry in shown} == {"test_max_pool2d 2 forward fp32 5"}
    for entry in shown:
        m = measured[entry["params"]["variant"]]
        assert entry["stats"]["median"] == pytest.approx(m.median, rel=1e-6, abs=1e-9)
        assert entry["stats"]["rounds"] == len(m.seconds)
        assert entry["extra_info"]["percent_of_floor"] == pytest.approx(100 * m.floor_share)


def test_only_what_was_selected_is_measured_and_a_record_grows(tmp_path: Path) -> None:
    for selection in ("forward and eager_nchw", "backward and alexkern"):
        arguments = ("bench/bench_pool.py", "--trial", f"--results={tmp_path}")
        run = bench(*arguments, "--benchmark-only", f"-k{selection}")
        assert run.returncode == 0, run.stdout
    kinds = {(m.key.direction, m.key.variant) for m in the_record(tmp_path).measurements}
    assert kinds == {("forward", "eager_nchw"), ("backward", "alexkern")}


@pytest.mark.slow
def test_tuning_checks_candidates(tmp_path: Path) -> None:
    selection = "-kpool5 and forward and (shipped or 1024-1-4)"
    arguments = ("bench/bench_tune.py", "--trial", "--tune", selection)
    outcomes = ("-p", "bench.outcomes", "--outcomes", "configurations", str(tmp_path))
    run = bench(*arguments, "--benchmark-disable", *outcomes)
    assert run.returncode == 0, run.stdout
    assert the_record(tmp_path).tests["configurations"].passed == 2
    run = bench(*arguments, "--benchmark-only", f"--results={tmp_path}")
    assert run.returncode == 0, run.stdout
    assert [(m.key.variant, len(m.seconds)) for m in the_record(tmp_path).measurements] == [
        ("shipped", 3),
        ("1024-1-4", 3),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_everything_on_a_trial(tmp_path: Path) -> None:
    """All suites in full width: every variant runs, is right, and is recorded."""
    for only in ([], ["--vendor"]):
        arguments = ("--benchmark-only", "--trial", "--full", f"--results={tmp_path}")
        run = bench("bench", *arguments, *only)
        assert run.returncode == 0, run.stdout
    made = the_record(tmp_path)
    suites = {"ops", "vendor", "network", "path", "data", "parallel"}
    assert {m.key.suite for m in made.measurements} == suites
    assert not [m for m in made.measurements if m.failure or not m.seconds]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_borrowed_gpu_script_ends_with_a_table_and_leaves_a_record(tmp_path: Path) -> None:
    environment = {"PYTEST_ADDOPTS": "--trial", "RESULTS": str(tmp_path)}
    run = subprocess.run(
        ["bash", "bench/on_gpu.sh", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**_inherited(), **environment},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    suites = {"ops", "path", "network"}
    assert {m.key.suite for m in the_record(tmp_path).measurements} == suites
    table = run.stdout.splitlines()
    assert any(line.startswith("conv5 backward fp32 2: alexkern ") for line in table)


def test_outcome_of_a_test_run_is_kept(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_left_out(): pytest.skip('no reason')\n"
    )
    arguments = ("-p", "bench.outcomes", "--outcomes", "suite", str(tmp_path / "results"))
    run = bench(*arguments, str(tmp_path / "test_three.py"), PYTHONPATH=str(ROOT))
    assert run.returncode == 1
    outcome = the_record(tmp_path / "results").tests["suite"]
    assert (outcome.passed, outcome.skipped, outcome.complete) == (1, 1, True)
    assert [name.rpartition("::")[2] for name in outcome.failed] == ["test_wrong"]


def test_a_gpu_script_knows_its_slices() -> None:
    run = subprocess.run(
        ["bash", "bench/on_gpu.sh", "7"], capture_output=True, text=True, cwd=ROOT, env=_inherited()
    )
    assert run.returncode == 2
    assert "no slice 7: 1 to 4" in run.stderr
