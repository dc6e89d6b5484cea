"""Figures from runs."""

from alexkern.figures.curves import Run, draw, plot, read_run

__all__ = ["Run", "draw", "plot", "read_run"]
