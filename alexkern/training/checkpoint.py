"""Checkpoints: written whole or not at all, verified, read without running code."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from alexkern.files import replacing
from alexkern.training.errors import UsageError

BEST = "best.pt"
_KEPT = 2

# Ends every file: what torch.load reads, a zip archive, may be followed by other bytes.
_TRAILER = b"\nsha256 "
_TRAILER_SIZE = len(_TRAILER) + 64 + 1

_KEYS = {
    *("format", "model", "optimizer", "scaler", "schedule", "meter", "step", "evaluated", "best"),
    *("options", "class_names"),
}
FORMAT = 1


def path_at(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"checkpoint-{step:08d}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: a crash at any moment leaves what was at ``path`` before, or this.

    Args:
        path: File to write.
        state: Tensors and plain types (see :func:`load`).

    Raises:
        OSError: It cannot be written.
    """
    try:
        with replacing(path) as file:
            hashing = _Hashing(file)
            torch.save(state, hashing)  # type: ignore[arg-type]
            file.write(_TRAILER + hashing.digest.hexdigest().encode() + b"\n")
    except RuntimeError as error:
        cause = error.__context__
        if isinstance(cause, OSError):  # torch has closed its archive, which fails anew
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def tidy(folder: Path) -> None:
    """Remove all but the newest checkpoints, and what a crash left half written."""
    for old in [*folder.glob("*.tmp"), *_newest_first(folder)[_KEPT:]]:
        old.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU.

    Returns:
        ``model``, ``optimizer``, ``scaler``, ``schedule`` and ``meter`` (state dicts), ``step``
        (whole steps done), ``evaluated`` (the last step that was followed by an evaluation),
        ``best`` (evaluation), ``options`` (of the run), ``class_names``, ``format``.

    Raises:
        UsageError: There is none, it is damaged, or it is not one of this program's.
    """
    try:
        with open(path, "rb") as file:
            if damage := _damage(file):
                raise UsageError(f"{path} is not a readable checkpoint: {damage}")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"no checkpoint at {path}: --resume takes the file of an earlier run"
        ) from error
    except UsageError:
        raise
    except _UNREADABLE as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{path} is not a readable checkpoint ({reason})") from error
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


# RuntimeError: torch's reader of archives
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"), key=lambda path: path.name, reverse=True)


def _damage(file: IO[bytes]) -> str:
    """Why the file's content is not what its last line says, empty if it is; rewinds."""
    size = os.fstat(file.fileno()).st_size - _TRAILER_SIZE
    digest = hashlib.sha256()
    while (left := size - file.tell()) > 0 and (chunk := file.read(min(left, 1 << 20))):
        digest.update(chunk)
    trailer = file.read()
    file.seek(0)
    if trailer == _TRAILER + digest.hexdigest().encode() + b"\n":
        return ""
    if trailer.startswith(_TRAILER):
        return "its checksum is not that of its content, it was damaged"
    return "it does not end with a checksum, it was cut short or is something else"


class _Hashing:
    """A file that is only written to, and a digest of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
