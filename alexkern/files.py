"""Files that are whole or not there, and PyTorch's own files, read without running code."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name at the end.

    A crash at any moment leaves the old file or the new one; an exception leaves the old one.

    Args:
        path: The name; its folder exists.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name last as well
    finally:
        os.close(folder)


def load_torch(path: Path) -> Any:
    """What ``torch.save`` wrote, its tensors on the CPU.

    Raises:
        ValueError: It cannot be read as tensors and plain types; the message is the reason.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(str(error).strip().split("\n")[0]) from error
