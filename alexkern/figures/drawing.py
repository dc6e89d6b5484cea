"""Figures by matplotlib, and their files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from alexkern.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By Okabe and Ito ("Color Universal Design", 2008), for all kinds of colour vision; without their
# yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_SUFFIXES = (".svg", ".png")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, that no window shows.

    Args:
        width: In inches; 9 fill a README's page.
        height: Likewise.

    Raises:
        ImportError: matplotlib is not installed; names the command that installs it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'alexkern[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", stem: Path) -> list[Path]:
    """Write a figure as SVG (with its text as text) and as PNG: the same bytes each time.

    Args:
        figure: What to write.
        stem: The files' path; an ending ``.svg`` or ``.png`` does not count.

    Returns:
        The files. Each is written whole or not at all.

    Raises:
        OSError: One cannot be written.
    """
    import matplotlib

    if stem.suffix in _SUFFIXES:
        stem = stem.with_suffix("")
    contents = {}
    with matplotlib.rc_context({"svg.hashsalt": "alexkern", "svg.fonttype": "none"}):
        for suffix in _SUFFIXES:
            content = io.BytesIO()
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(content, format=suffix[1:], dpi=150, metadata=metadata)
            contents[stem.with_name(stem.name + suffix)] = content.getvalue()
    for path, drawn in contents.items():
        with replacing(path) as file:
            file.write(drawn)
    return list(contents)
