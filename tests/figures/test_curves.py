"""Curves show what metrics.csv holds, and what it does not hold is said."""

import io
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alexkern import cli
from alexkern.figures import draw, plot, read_run
from alexkern.figures.curves import MOST_POINTS
from alexkern.figures.drawing import COLOURS, new_figure

HEADER = (
    "step,epoch,train_loss,train_top1_error,val_loss,val_top1_error,val_top5_error,"
    "learning_rate,images_per_second,data_wait_share"
)
# two epochs of 6 steps, a row each 4 and at an epoch's end
ROWS = [
    "4,1,2.5,0.9,,,,0.01,100,0.1",
    "6,1,2,0.8,2.25,0.85,0.5,0.01,110,0.1",
    "8,2,1.5,0.7,,,,0.001,120,0.1",
    "12,2,1,0.6,1.75,0.65,0.25,0.001,130,0.1",
]
PANELS = ("loss", "error", "learning rate", "images/s")


def make_run(folder: Path, rows: list[str] = ROWS, end: str = "") -> Path:
    """A run's folder, written as csv.writer does."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\r\n" for line in [HEADER, *rows])
    (folder / "metrics.csv").write_text(text + end, newline="")
    return folder


def drawn(*folders: Path) -> dict[str, Any]:
    """The panels by the label of their vertical axis."""
    figure = new_figure(9, 6)
    draw([read_run(folder) for folder in folders], figure)
    return {axes.get_ylabel(): axes for axes in figure.axes}


def lines(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_lines_are_the_rows_over_epochs(tmp_path: Path) -> None:
    panels = drawn(make_run(tmp_path / "run"))
    assert tuple(panels) == PANELS
    x, ends = pytest.approx([4 / 6, 1, 8 / 6, 2]), [1, 2]
    assert lines(panels["loss"]) == [(x, [2.5, 2, 1.5, 1]), (ends, [2.25, 1.75])]
    assert lines(panels["error"]) == [
        (x, [0.9, 0.8, 0.7, 0.6]),
        (ends, [0.85, 0.65]),
        (ends, [0.5, 0.25]),
    ]
    assert lines(panels["learning rate"]) == [(x, [0.01, 0.01, 0.001, 0.001])]
    assert lines(panels["images/s"]) == [(x, [100, 110, 120, 130])]
    assert panels["learning rate"].get_yscale() == "log"
    assert panels["learning rate"].lines[0].get_drawstyle() == "steps-pre"
    assert panels["images/s"].get_xlabel() == "epoch"


def test_runs_of_other_lengths_and_epochs_are_compared_by_epoch(tmp_path: Path) -> None:
    short = ["50,1,3,0.95,2.9,0.9,0.7,0.02,90,0.1"]
    panels = drawn(make_run(tmp_path / "long"), make_run(tmp_path / "short", short))
    training, _, other, other_validation = lines(panels["loss"])
    assert training[0][-1] == 2
    assert (other, other_validation) == (([1], [3]), ([1], [2.9]))
    colours = [line.get_color() for line in panels["loss"].lines]
    assert colours == [COLOURS[0], COLOURS[0], COLOURS[1], COLOURS[1]]
    # a point alone is no line
    assert panels["loss"].lines[3].get_marker() == "."


def test_a_first_epoch_that_did_not_end_is_drawn_over_steps(tmp_path: Path) -> None:
    begun = make_run(tmp_path / "begun", ROWS[:1])
    panels = drawn(begun, make_run(tmp_path / "done"))
    assert [x for x, _ in lines(panels["images/s"])] == [[4], [4, 6, 8, 12]]
    assert panels["images/s"].get_xlabel() == "step"


def test_runs_without_validation(tmp_path: Path) -> None:
    rows = ["4,1,2.5,0.9,,,,0.01,100,0.1", "6,1,2,0.8,,,,0.01,100,0.1", "8,2,2,0.8,,,,0.01,99,0"]
    panels = drawn(make_run(tmp_path, rows))
    assert lines(panels["loss"])[0][0] == pytest.approx([4 / 6, 1, 8 / 6])
    assert lines(panels["loss"])[1] == ([], [])


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_or_not_positive(tmp_path: Path) -> None:
    """A loss that diverged is a gap; a rate of 0 has no place on a logarithmic scale."""
    rows = ["5,1,nan,0.9,inf,nan,0.5,0,100,0", "10,2,1,0.9,1,0.8,0.5,0,inf,0", "12,3,inf,,,,,0,0,0"]
    panels = drawn(make_run(tmp_path / "run", rows))
    (x, y), _ = lines(panels["loss"])
    assert x == pytest.approx([1, 2, 2.4])
    assert y == pytest.approx([math.nan, 1, math.inf], nan_ok=True)
    assert lines(panels["error"])[0] == ([1, 2], [0.9, 0.9])
    for path in plot([tmp_path / "run"]):
        assert path.stat().st_size > 1000


def test_long_runs_are_drawn_as_means(tmp_path: Path) -> None:
    count = 4 * MOST_POINTS - 1
    rates = [0.1 if step <= 777 else 0.01 for step in range(1, count + 1)]
    rows = [f"{i},1,{i},0.5,,,,{rate},{2 * i},0" for i, rate in enumerate(rates, 1)]
    panels = drawn(make_run(tmp_path, rows))
    ((x, y), _), ((_, speed),) = lines(panels["loss"]), lines(panels["images/s"])
    assert x == [*range(4, count, 4), count]
    assert y == [*(i - 1.5 for i in range(4, count, 4)), count - 1]
    assert speed == [2 * value for value in y]
    assert lines(panels["learning rate"])[0] == (list(range(1, count + 1)), rates)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named after the run folders, whatever those names hold; the same bytes each time."""
    names = ["_relu", "tanh $x^2$", "a<b>&c", "größe"]
    folders = [str(make_run(tmp_path / name)) for name in names]
    assert cli.main(["plot", *folders]) == 0
    svg, png = (tmp_path / "_relu" / f"curves.{kind}" for kind in ("svg", "png"))
    assert capsys.readouterr().out.split("\n") == [str(svg), str(png), ""]
    texts = {
        element.text for element in ET.parse(svg).iter() if element.tag.rpartition("}")[2] == "text"
    }
    assert texts >= {*names, "training, top-1", "validation, top-5", "epoch", *PANELS}
    with Image.open(io.BytesIO(png.read_bytes())) as image:
        assert image.size == (1350, 900)
        shown = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    # the speeds hide each other
    assert shown >= {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS[: len(names)]}
    again = plot([Path(folder) for folder in folders], tmp_path / "new" / "again.svg")
    assert [path.name for path in again] == ["again.svg", "again.png"]
    assert [path.read_bytes() for path in again] == [svg.read_bytes(), png.read_bytes()]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_run(tmp_path / place / "run") for place in ("a", "b")]
    monkeypatch.chdir(folders[0])
    svg, _ = plot([Path("."), folders[1], folders[0]], tmp_path)
    assert svg == tmp_path / "curves.svg"
    texts = svg.read_text("utf-8")
    assert texts.count("a/run<") == texts.count("b/run<") == 1


def test_half_a_last_row_is_left_out(tmp_path: Path) -> None:
    whole = read_run(make_run(tmp_path / "run"))
    assert whole.name == "run"
    for length in range(len(ROWS[-1]) + 1):
        torn = make_run(tmp_path / "run", ROWS[:-1], end=ROWS[-1][:length])
        assert read_run(torn).rows == whole.rows[:-1]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "holds no row yet"),
        (["4,1,2.5,0.9,,,,0.01,100"], "line 2: 9 fields, where the header has 10"),
        ([*ROWS, ""], "line 6: 1 fields"),
        ([ROWS[0], "8,1,high,0.9,,,,1,1,1"], "line 3: train_loss is 'high', not a number"),
        ([ROWS[1], ROWS[0]], "line 3: step is 4.0, after 6"),
        (["0" + ROWS[0][1:]], "line 2: step is 0.0, after 0"),
        ([ROWS[0][1:]], "line 2: step is None, after 0"),
        (["nan,1,2.5,0.9,,,,0.01,100,0"], "line 2: step is nan"),
        (["4,0,2.5,0.9,,,,0.01,100,0"], "line 2: epoch is 0.0"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, rows: list[str], problem: str) -> None:
    make_run(tmp_path, rows)
    with pytest.raises(ValueError, match=problem) as error:
        read_run(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'metrics.csv'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"step,epoch\n1,1\n", b"\x89PNG\r\n\x1a\n\xff\x00\n"])
def test_files_that_hold_no_metrics(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"holds no metrics: it has no column .*train_loss"):
        read_run(tmp_path)


def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(make_run(tmp_path / "run"))
    (tmp_path / "file").touch()

    def complaint(*arguments: str) -> str:
        assert cli.main(["plot", *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("alexkern: ")
        assert err.count("\n") == 1
        return err

    assert f"cannot read {tmp_path}/none/metrics.csv: No such" in complaint(f"{tmp_path}/none")
    assert "8 runs: a plot shows 1 to 7" in complaint(*(f"{run}/{i}" for i in range(8)))
    assert f"{tmp_path}/file/x.svg" in complaint(run, "--output", f"{tmp_path}/file/x")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'alexkern[plot]'" in complaint(run)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]
