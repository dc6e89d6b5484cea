"""Files that are there whole or not at all, whatever happens while they are written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, temporary: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place, and put it there once the disk has it.

    Args:
        path: The file; one that is there is replaced.
        temporary: Where to write, on the same file system; left behind only if the process dies.
        write: Writes to the file that it is given.

    Raises:
        OSError: As from any writing; what was at ``path`` is untouched then.
    """
    try:
        with open(temporary, "wb") as file:
            write(file)
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
