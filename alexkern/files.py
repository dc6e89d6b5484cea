"""Files that are whole or not there, and PyTorch's own files, checked and read without code."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

# Ends what save_torch writes: a zip archive, which is what torch.load reads, may be followed by
# other bytes.
_SEAL = b"\nsha256 "
_SEAL_SIZE = len(_SEAL) + 64 + 1


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends.

    If the block raises, ``path`` is as it was before; if the machine stops in it as well, and a
    file ``<name>.<process>.tmp`` stays. Folders that are missing are made.

    Raises:
        OSError: It cannot be written; names ``path``.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the new name last as well
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_torch(content: Any, path: Path) -> None:
    """Write what ``torch.load`` reads, whole or not at all, and sealed: its last line is a digest.

    Raises:
        OSError: It cannot be written; names ``path``.
    """
    try:
        with replacing(path) as file:
            hashing = _Hashing(file)
            torch.save(content, hashing)  # type: ignore[arg-type]
            file.write(_SEAL + hashing.digest.hexdigest().encode() + b"\n")
    except RuntimeError as error:
        cause = error.__context__
        if isinstance(cause, OSError):  # torch has closed its archive, which fails anew
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def load_torch(path: Path, *, sealed: bool = False) -> Any:
    """What ``torch.save`` wrote, its tensors on the CPU.

    Args:
        path: The file.
        sealed: Whether :func:`save_torch` must have written it. If it did, a change of any bit is
            noticed, which ``torch.load`` alone does not.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be read as tensors and plain types; the message is the reason.
    """
    try:
        with open(path, "rb") as file:
            _check_seal(file, sealed)
            return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes torch's reader raise many types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(reason or type(error).__name__) from error


def seal_of(path: Path) -> str:
    """The digest in the last line of what :func:`save_torch` wrote."""
    with open(path, "rb") as file:
        file.seek(-_SEAL_SIZE, os.SEEK_END)
        return file.read().removeprefix(_SEAL).decode().strip()


def _check_seal(file: BinaryIO, required: bool) -> None:
    """Raise ValueError if the file's content is not what its last line says; rewinds."""
    size = os.fstat(file.fileno()).st_size - _SEAL_SIZE
    file.seek(max(size, 0))
    seal = file.read()
    file.seek(0)
    if not seal.startswith(_SEAL):
        if required:
            raise ValueError(
                "it does not end with a checksum: it was cut short or is something else"
            )
        return
    digest = hashlib.sha256()
    while chunk := file.read(min(size - file.tell(), 1 << 20)):
        digest.update(chunk)
    file.seek(0)
    if seal != _SEAL + digest.hexdigest().encode() + b"\n":
        raise ValueError("its checksum is not that of its content: it was damaged")


class _Hashing:
    """A file that is only written to, and a digest of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
