"""Checkpoints: written whole or not at all, read without running code."""

from pathlib import Path
from typing import Any

import torch

from alexkern.files import load_torch, replacing
from alexkern.training.errors import UsageError

FILE_NAME = "checkpoint.pt"
_KEYS = {"model", "optimizer", "scaler", "epoch", "step", "options", "class_names"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at ``path``: a crash at any moment leaves the old one or the new.

    Args:
        path: File to write.
        state: Tensors and plain types (see :func:`load`).
    """
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU.

    Returns:
        ``model``, ``optimizer`` and ``scaler`` (state dicts), ``epoch`` and ``step`` (whole
        epochs and steps done), ``options`` (of the run), ``class_names``.

    Raises:
        UsageError: There is none, or it is not readable, or not one of this program's.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}: --resume takes the file of an earlier run")
    try:
        state = load_torch(path)
    except ValueError as error:
        raise UsageError(f"{path} is not a readable checkpoint ({error})") from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UsageError(f"{path} is not a checkpoint of train_alexnet.py")
    return state
