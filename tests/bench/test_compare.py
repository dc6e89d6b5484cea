"""What counts as slower between two records."""

from pathlib import Path

import pytest

from bench.compare import changes, main
from bench.record import save
from tests.records import measurement, record


def spread(median: float, noise: float = 0.01) -> list[float]:
    return [median * (1 + noise * (i / 20 - 1)) for i in range(41)]


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (spread(1.0), spread(1.10), (1, 0)),
        (spread(1.0), spread(0.90), (0, 1)),
        (spread(1.0), spread(1.0), (0, 0)),
        (spread(1.0, 0.001), spread(1.015, 0.001), (0, 0)),  # apart, but as two runs may be
        (spread(1.0, 0.5), spread(1.10, 0.5), (0, 0)),  # intervals overlap
        (spread(1.0), [], (1, 0)),  # no longer right
        ([], spread(1.0), (0, 0)),  # was never timed
    ],
)
def test_slower_and_faster(
    then: list[float], now: list[float], expected: tuple[int, int], tmp_path: Path
) -> None:
    failure = None if now else "AssertionError: wrong result"
    old, new = record(measurement(seconds=then)), record(measurement(seconds=now, failure=failure))
    slower, faster = changes(old, new)
    assert (len(slower), len(faster)) == expected
    for name, made in (("old", old), ("new", new)):
        save(made, tmp_path / f"{name}.json")
    assert main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == expected[0]


def test_lines_name_the_measurement(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(record(measurement(seconds=spread(1e-5))), tmp_path / "old.json")
    save(record(measurement(seconds=spread(2e-5))), tmp_path / "new.json")
    main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    printed = capsys.readouterr().out
    assert "1 measurements in both: 1 slower, 0 faster" in printed
    assert "slower  pool1 forward bf16 128 alexkern: 10.0 -> 20.0 us (2.00x)" in printed
