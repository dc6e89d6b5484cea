"""Records keep what was measured, and nothing that is not a record is taken for one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import machine
from bench.record import (
    FORMAT,
    RESULTS,
    Record,
    RecordError,
    load,
    newest,
    save,
)
from tests.records import measurement, record


def test_round_trip_keeps_every_sample(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200" / "2026-01-02-abc.json"
    made = record(measurement(), measurement("compile", failure="OutOfMemoryError: no"))
    save(made, path)
    assert load(Record, path) == made
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("commit"), "commit"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c["measurements"][0].update(calls="ten"), "measurements[0].calls"),
        (lambda c: c["measurements"][0].update(calls=True), "measurements[0].calls"),
        (lambda c: c["measurements"][0]["seconds"].append(None), "seconds[3]"),
        (lambda c: c["machine"].update(cores=1.5), "machine.cores"),
        (lambda c: c.update(format=FORMAT + 1), f"format {FORMAT + 1}"),
    ],
)
def test_what_differs_from_the_schema_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    save(record(measurement()), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError) as raised:
        load(Record, path)
    assert named in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3"])
def test_what_is_no_record_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordError):
        load(Record, path)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    save(record(measurement()), path)
    before = path.read_bytes()
    with pytest.raises(RecordError):
        save(record(measurement(seconds=["fast"])), path)
    assert path.read_bytes() == before


def test_a_measurement_replaces_that_of_its_key() -> None:
    made = record(measurement(), measurement("compile"))
    made.add([measurement(seconds=[5e-6])])
    assert [m.key.variant for m in made.measurements] == ["alexkern", "compile"]
    assert made.measurements[0].seconds == [5e-6]


def test_newest_is_the_latest_of_all_gpus(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name in ("nvidia-h100/2026-01-03-aaa", "nvidia-h200/2026-01-02-zzz", "compile/triton-9"):
        save(record(measurement()), tmp_path / f"{name}.json")
    assert newest(tmp_path) == tmp_path / "nvidia-h100/2026-01-03-aaa.json"
    assert newest(tmp_path, gpu=False) is None
    save(record(measurement()), tmp_path / "cpu/2026-01-09-bbb.json")
    assert newest(tmp_path) == tmp_path / "nvidia-h100/2026-01-03-aaa.json"
    assert newest(tmp_path, gpu=False) == tmp_path / "cpu/2026-01-09-bbb.json"


def test_median_and_its_interval() -> None:
    """For n samples the interval's ends have the ranks that hold 95 % of a binomial(n, 1/2)."""
    forty = [float(i) for i in range(1, 41)]
    made = measurement(seconds=reversed(forty))
    assert made.median == 20.5
    low, high = made.interval
    chances = [math.comb(40, k) / 2**40 for k in range(41)]
    below = int(low) - 1
    assert high == 40 - below
    inside = sum(chances[below + 1 : 40 - below])
    assert inside >= 0.95
    assert made.floor_share == 1e-6 / 20.5
    assert math.isnan(measurement(seconds=[]).median)
    assert measurement(seconds=[1.0]).interval == (1.0, 1.0)


def test_committed_records_are_records() -> None:
    for path in RESULTS.glob("*/*.json"):
        if path.parent.name != "compile":
            made = load(Record, path)
            assert path.parent.name == machine.folder_name(made.machine)
            assert path.name == f"{made.date}-{made.commit}.json"
            assert path.stat().st_size < 16 * 2**20
