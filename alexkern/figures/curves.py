"""A run's curves: loss, errors, learning rate and speed, of one run or of several."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexkern.figures.drawing import COLOURS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A curve of more points is a band that hides the others.
MOST_POINTS = 500
# Of fewer than this, each is marked: one alone, or one between two that are NaN, is no line.
_MARKED = 30

_TRAINING: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.6}
_VALIDATION: dict[str, Any] = {"linewidth": 1.8}
# By the label of the vertical axis: columns of metrics.csv, with a name if there are several.
_PANELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "loss": {
        "train_loss": ("training", _TRAINING),
        "val_loss": ("validation", _VALIDATION),
    },
    "error": {
        "train_top1_error": ("training, top-1", _TRAINING),
        "val_top1_error": ("validation, top-1", _VALIDATION),
        "val_top5_error": ("validation, top-5", {**_VALIDATION, "linestyle": "--"}),
    },
    "learning rate": {
        # that of the steps since the row before
        "learning_rate": ("", {"linewidth": 1.4, "drawstyle": "steps-pre"}),
    },
    "images/s": {"images_per_second": ("", {"linewidth": 1.4})},
}
_COLUMNS = ("step", "epoch", *(column for panel in _PANELS.values() for column in panel))


@dataclass(frozen=True)
class Run:
    """What a run's metrics.csv holds.

    Attributes:
        name: For the legend.
        rows: At least one; values by column, without the fields that are empty.
    """

    name: str
    rows: list[dict[str, float]]

    @property
    def steps_per_epoch(self) -> float | None:
        """As the rows tell it; None if the first epoch did not end."""
        if self.rows[-1]["epoch"] == 1 and not any("val_loss" in row for row in self.rows):
            return None
        # a row within an epoch gives less than one at its end
        return max(row["step"] / row["epoch"] for row in self.rows)

    def points(self, column: str) -> list[tuple[float, float]]:
        """Step and value of each row that has the column."""
        return [(row["step"], row[column]) for row in self.rows if column in row]


def read_run(folder: Path, name: str = "") -> Run:
    """Read the metrics of a run, also of one that goes on.

    Args:
        folder: Of the run. Rows are whole lines of its metrics.csv: what stands behind the last
            end of a line is half a row, and is left out.
        name: For the legend; the folder's if it is empty.

    Raises:
        ValueError: No metrics are there, or a line is none of them; one line that names it.
    """
    path = folder / "metrics.csv"
    try:
        text = path.read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a run's folder") from error
    lines = text.split("\n")[:-1]
    header = lines[0].split(",") if lines else []
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise ValueError(f"{path} holds no metrics: it has no column {', '.join(missing)}")
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(_row(header, line, rows[-1]["step"] if rows else 0))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no row yet")
    return Run(name or os.path.basename(os.path.abspath(folder)), rows)


def _row(header: Sequence[str], line: str, step: float) -> dict[str, float]:
    """The values of a line that follows the one of ``step``."""
    fields = line.split(",")
    if len(fields) != len(header):
        raise ValueError(f"{len(fields)} fields, where the header has {len(header)}")
    row = {}
    for column, field in zip(header, fields, strict=True):
        if column in _COLUMNS and field:
            try:
                row[column] = float(field)
            except ValueError:
                raise ValueError(f"{column} is {field[:40]!r}, not a number") from None
    if not step < row.get("step", math.nan) < math.inf:
        raise ValueError(f"step is {row.get('step')}, after {step:g}")
    if not 1 <= row.get("epoch", math.nan) < math.inf:
        raise ValueError(f"epoch is {row.get('epoch')}; they count from 1")
    return row


def plot(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Draw the curves of runs into an SVG and a PNG file.

    Args:
        folders: Of the runs, at most as many as there are :data:`.drawing.COLOURS`.
        output: The files' path without their suffixes, or a folder, in which they are called
            ``curves``; the first run's folder if None.

    Returns:
        The files.

    Raises:
        ValueError: A run cannot be read, or there are none, or too many.
        ImportError: matplotlib is not installed.
        OSError: A file cannot be written.
    """
    found = {Path(os.path.abspath(folder)): folder for folder in folders}
    if not 1 <= len(found) <= len(COLOURS):
        raise ValueError(
            f"{len(found)} runs: a plot shows 1 to {len(COLOURS)}, in colours that all can tell "
            "apart"
        )
    output = output or folders[0]
    if output.is_dir():
        output = output / "curves"
    # the shortest names by which they differ, such as `a/run` and `b/run`
    common = os.path.commonpath([place.parent for place in found])
    runs = [read_run(folder, str(place.relative_to(common))) for place, folder in found.items()]
    figure = new_figure(9, 6)
    draw(runs, figure)
    return save(figure, output)


def draw(runs: Sequence[Run], figure: "Figure") -> None:
    """Draw four panels: loss, errors, learning rate and images per second.

    Args:
        runs: Each gets a colour. They are drawn over epochs, or over steps if the first epoch of
            one did not end, so that nobody knows how long it is.
        figure: An empty one.
    """
    from matplotlib.ticker import PercentFormatter

    lengths = [run.steps_per_epoch or 0 for run in runs]
    in_epochs = all(lengths)
    panels: Any = figure.subplots(2, 2, sharex=True)
    for axes, (label, columns) in zip(panels.flat, _PANELS.items(), strict=True):
        for run, length, colour in zip(runs, lengths, COLOURS[: len(runs)], strict=True):
            unit = length if in_epochs else 1
            for column, (_, style) in columns.items():
                points = run.points(column)
                if column != "learning_rate":  # whose drops are sharp
                    points = _thinned(points)
                x, y = [step / unit for step, _ in points], [value for _, value in points]
                marker = "." if len(points) < _MARKED else ""
                axes.plot(x, y, color=colour, marker=marker, **style)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss, error, rate, speed = panels.flat
    _name_lines(loss, "loss")
    _name_lines(error, "error")
    error.set_ylim(bottom=0)
    error.yaxis.set_major_formatter(PercentFormatter(1))
    if any(y > 0 for run in runs for _, y in run.points("learning_rate")):
        rate.set_yscale("log", nonpositive="mask")
    speed.set_ylim(bottom=0)
    for axes in (rate, speed):
        axes.set_xlabel("epoch" if in_epochs else "step")
        axes.set_xlim(left=0)
    _name_runs(figure, [run.name for run in runs])


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`MOST_POINTS`: means of as many neighbours as that takes, at the last's step.

    A row is itself the mean over the steps since the row before.
    """
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _name_lines(axes: "Axes", panel: str) -> None:
    """A legend of the styles, in grey, as they are the same in all colours."""
    from matplotlib.lines import Line2D

    named = _PANELS[panel].values()
    handles = [Line2D([], [], color="dimgrey", label=name, **style) for name, style in named]
    axes.legend(handles=handles, frameon=False)


def _name_runs(figure: "Figure", names: Sequence[str]) -> None:
    """A legend of the colours above the panels."""
    from matplotlib.lines import Line2D

    shown = ["".join(c if c.isprintable() else "?" for c in name) for name in names]
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in COLOURS[: len(names)]]
    legend = figure.legend(
        handles,
        [str(number) for number in range(len(names))],
        loc="outside upper center",
        ncols=max(1, min(len(names), 110 // (8 + max(map(len, shown))))),
        frameon=False,
    )
    # As labels, names with _ in front would be left out, and those with $ read as formulas.
    for text, name in zip(legend.get_texts(), shown, strict=True):
        text.set_text(name)
        text.set_parse_math(False)
