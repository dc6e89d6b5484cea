"""Checkpoints: written whole or not at all, verified, read without running code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alexkern.files import load_torch
from alexkern.training.errors import UsageError

BEST = "best.pt"
FORMAT = 2
_KEPT = 2
_NAME = f"checkpoint-{'[0-9]' * 8}.pt"  # no copy that a user made under a similar name
_WRITTEN = (_NAME, BEST, "metrics.csv", "config.toml")
_KEYS = {
    *("format", "model", "optimizer", "scaler", "schedule", "meter", "step", "steps_per_epoch"),
    *("evaluated", "best", "options", "class_names"),
}


def path_at(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"checkpoint-{step:08d}.pt"


def tidy(folder: Path, step: int) -> None:
    """Remove what a run that has come to ``step`` has no use for.

    All but the newest checkpoints, those of later steps, which will be done again, and what a
    crash left half written.
    """
    later = newer(folder, step)
    old = [path for path in _newest_first(folder) if path not in later][_KEPT:]
    unfinished = [path for name in _WRITTEN for path in folder.glob(f"{name}.*.tmp")]
    for path in [*later, *old, *unfinished]:
        path.unlink(missing_ok=True)


def newer(folder: Path, step: int) -> list[Path]:
    """The checkpoints of later steps than this."""
    return [path for path in _newest_first(folder) if path.name > path_at(folder, step).name]


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU.

    Returns:
        ``model`` (parameters by name), ``optimizer`` (for each kind of its state, tensors by the
        name of the parameter), ``scaler``, ``schedule`` and ``meter`` (state dicts), ``step``
        (whole steps done), ``steps_per_epoch``, ``evaluated`` (the last step that was followed by
        an evaluation), ``best`` (evaluation), ``options`` (of the run), ``class_names``,
        ``format``.

    Raises:
        UsageError: There is none, it is damaged, or it is not one of this program's.
    """
    try:
        state = load_torch(path, sealed=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"no checkpoint at {path}: --resume takes the file of an earlier run"
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is not a readable checkpoint ({error})") from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UsageError(f"{path} is not a checkpoint of train_alexnet.py")
    if state["format"] != FORMAT:
        raise UsageError(
            f"{path} has format {state['format']}, and this version reads format {FORMAT}"
        )
    return state


def load_newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a run's folder that is whole; None if the folder has none.

    Args:
        folder: Of the run.
        say: Told of each damaged one that is passed over.

    Raises:
        UsageError: There are checkpoints, and all are damaged.
    """
    candidates = _newest_first(folder)
    for path in candidates:
        try:
            return path, load(path)
        except UsageError as error:
            say(f"{error}: passed over")
    if candidates:
        raise UsageError(f"no checkpoint in {folder} can be read")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(_NAME), key=lambda path: path.name, reverse=True)
