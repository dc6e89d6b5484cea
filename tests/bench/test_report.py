"""Pages show what the records hold, and nothing else."""

import dataclasses
import re
from pathlib import Path

import pytest

from bench import report
from bench.compile_record import CompileRecord
from bench.record import Key, Record, RecordError, load, newest, save
from bench.scaling import CPU_BATCH, CPU_LAYOUTS
from tests.records import measurement, record


def test_pages_hold_the_newest_records_tables() -> None:
    """What `python -m bench report --check` says in CI."""
    assert report.main(["--check"]) == 0


def test_a_page_that_differs_is_noticed_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- table: ops -->\nold\n<!-- end of table -->\nafter\n")
    path = tmp_path / "nvidia-h200" / "2026-01-02-abc.json"
    save(record(measurement(), measurement("compile", seconds=[9e-6])), path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(report, "pages", lambda: [page])
    results = f"--results={tmp_path}"
    assert report.main(["--check", results]) == 1
    assert "page.md: differs" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert report.main(["--write", results]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Before\n<!-- table: ops -->\n")
    assert text.endswith("<!-- end of table -->\nafter\n")
    row = (
        "| pool1 forward, bf16, 128 | 2.0 ± 1.0 | - | - | - | 9.0 ± 0.0 | 1.0 | - | 50 % | 4.50x |"
    )
    assert row in text
    assert report.main(["--check", results]) == 0


def test_a_trial_s_times_do_not_get_into_pages(tmp_path: Path) -> None:
    made = record(measurement())
    made.machine = dataclasses.replace(made.machine, gpu="")
    path = tmp_path / "cpu" / "2026-01-02-abc.json"
    save(made, path)
    with pytest.raises(RecordError, match="without a GPU"):
        report.main([str(path), "--write", f"--results={tmp_path}"])
    assert report.tables(None, made)["ops"] == report.NOT_MEASURED


def test_the_data_pipeline_needs_no_gpu(tmp_path: Path) -> None:
    """Its table is the host's record's, unless the GPU's has one."""
    key = Key("data", "data", "training_batch", "", "", 128, "alexkern")
    made = record(measurement(key=key, seconds=[0.01]))
    made.machine = dataclasses.replace(made.machine, gpu="", cpu="an abacus", cores=3)
    table = report.tables(record(measurement()), made)["data"]
    assert "| training_batch, alexkern | 12,800 |" in table
    assert table.endswith("One core of a machine of 3 (an abacus).")
    assert "training_batch" in report.tables(made)["data"]
    assert report.tables(record(measurement()))["data"] == "Not measured yet."


def test_steps_of_several_processes_stand_beside_the_models() -> None:
    """The fastest of each, and messages take no time."""
    key = Key("parallel", "alexnet", "quarter", "training", "fp32", CPU_BATCH, "")
    times = {str(layout): [3e-3, 2e-3] for layout in CPU_LAYOUTS} | {"data 2": [9e-3, 8e-3]}
    made = record(
        *(
            measurement(key=dataclasses.replace(key, variant=variant), seconds=seconds)
            for variant, seconds in {**times, "one process": [1e-3]}.items()
        ),
        measurement(
            key=dataclasses.replace(key, variant="one process", batch=CPU_BATCH // 2),
            seconds=[5e-4],
        ),
        *(
            measurement(key=Key("parallel", "swap", "bytes", "", "", size, ""), seconds=[seconds])
            for size, seconds in ((0, 0.0), (1, 1e-30))
        ),
    )
    made.machine = dataclasses.replace(made.machine, gpu="", cores=2)
    table = report.tables(None, made)["parallel"]
    assert "| one process | 1.0 | 0.0 | 0.0 | 1.0 | 1.0 | 1.00 |" in table
    assert "| columns 2 | 0.5 | 0.0 | 0.0 | 0.5 | 2.0 | 4.00 |" in table
    assert "| data 2 | 0.5 | 0.0 | 0.0 | 0.5 | 8.0 | 16.00 |" in table
    assert "| data 2 x columns 2 | 0.5 |" in table
    assert report.tables(None, record(measurement()))["parallel"] == "Not measured yet."


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="surprise"):
        report.rendered("<!-- table: surprise -->\n<!-- end of table -->", {})


def test_without_a_gpu_record_pages_say_so(tmp_path: Path) -> None:
    made = report.tables(None)
    assert made["ops"] == report.NOT_MEASURED
    assert "lrn1" in made["compile"]


def test_failures_and_losses_are_shown() -> None:
    made = record(
        measurement(seconds=[4e-6]),
        measurement("eager_nchw", seconds=[2e-6]),
        measurement("compile", seconds=[], failure="RuntimeError: no"),
    )
    table = report.ops_table(made)
    assert "| 4.0 ± 0.0 | - | 2.0 ± 0.0 | - | failed | 1.0 | - | 25 % | 0.50x |" in table
    assert "compile RuntimeError: no" in report.short(made)
    assert "suite: 10 passed, 1 failed, 1 skipped" in report.short(made)


def test_the_prediction_stands_beside_the_measurement() -> None:
    made = record(measurement())
    made.machine = dataclasses.replace(made.machine, capability="sm_90")
    (launch,) = (
        k
        for k in load(CompileRecord, report.COMPILE_RECORD).kernels
        if (k.layer, k.direction) == ("pool1", "forward")
        and (k.target, k.dtype, k.layout) == ("sm_90", "bf16", "nhwc")
    )
    assert f"| 1.0 | {launch.predicted_us:.1f} | 50 % |" in report.ops_table(made)


def test_a_tuning_is_cut_to_the_fastest_and_the_wrong() -> None:
    made = record(
        measurement("shipped", seconds=[9e-6]),
        *(measurement(f"config{i}", seconds=[i * 1e-6]) for i in range(8, 0, -1)),
        measurement("bad", seconds=[], failure="AssertionError: wrong result"),
        measurement("large", seconds=[], failure="OutOfResources: shared memory"),
    )
    line = report.short(made).splitlines()[-1]
    names = re.findall(r"(shipped|config\d|bad|large) ", line)
    assert names == ["shipped", "config1", "config2", "config3", "bad"]


def test_plots_are_drawn_as_svg_and_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = record(
        measurement(),
        measurement("eager_nchw", seconds=[5e-6]),
        measurement("compile", seconds=[], failure="RuntimeError: no"),
        measurement("conv", seconds=[1e-5], flops=10**9, bytes=10**7),
    )
    written = report.plot(made, tmp_path)
    assert {path.name for path in written} == {
        f"{name}.{kind}" for name in ("ops", "roofline") for kind in ("svg", "png")
    }
    for path in written:
        start = path.read_bytes()[:100]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start


def test_a_store_feeds_a_gpu_as_promised() -> None:
    """At least 5,000 crops per second and core, and 8 times torchvision's usual pipeline."""
    path = newest(gpu=False)
    assert path is not None
    found = report.groups(load(Record, path).measurements, "data")
    (batch,) = (variants for key, variants in found.items() if key.layer == "training_batch")
    ours, theirs = (128 / batch[name].median for name in ("alexkern", "torchvision"))
    assert ours >= 5000
    assert ours >= 8 * theirs
