"""A folder of images: ``train/`` and ``val/``, one folder per class in each."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexkern.data.dataset import BUILT_IN, DataError, Split

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class FolderImages:
    """Image files, decoded when asked for: shorter side to ``size``, central square (paper §2).

    Args:
        root: Folder of the class folders.
        class_names: The class folders.
        labels: Class of each file, int64 [N].
        names: Encoded file name of each file, bytes [N]. An array, not a list: worker processes
            share its memory for good, where counting references would copy a list.
        size: Side of the images handed out.
    """

    def __init__(
        self,
        root: Path,
        class_names: tuple[str, ...],
        labels: NDArray[np.int64],
        names: NDArray[np.bytes_],
        size: int,
    ) -> None:
        self._root, self._class_names, self._labels = root, class_names, labels
        self._names, self._size = names, size

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        from alexkern.data.decode import ImageError, decode

        path = self._path(int(index))
        try:
            return decode(path, self._size)
        except ImageError as error:
            raise DataError(
                f"cannot decode {path} ({error}): replace or remove this file"
            ) from error

    def _path(self, index: int) -> Path:
        file_name: str = os.fsdecode(self._names[index])
        return self._root / self._class_names[int(self._labels[index])] / file_name


def image_folder(path: str, size: int) -> tuple[tuple[str, ...], Split, Split]:
    """The splits of ``path``; the classes are the folders in ``path/train``, sorted.

    Raises:
        DataError: A folder or a class is missing or empty, or Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"image folders need Pillow: pip install pillow ({error})") from error
    root = Path(path)
    if not root.is_dir():
        raise DataError(
            f"no folder {path!r}: --data takes {', '.join(BUILT_IN)}, or a folder with train/ "
            "and val/"
        )
    class_names = class_folders(root / "train")
    require_same_classes(class_names, class_folders(root / "val"))
    train, val = (_split(root / name, class_names, size) for name in ("train", "val"))
    return class_names, train, val


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the class folders in ``folder``, sorted.

    Raises:
        DataError: There are none, or ``folder`` does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: train/ and val/ must be there, one folder per class")
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(f"no class folders in {folder}: put each class's images in its own folder")
    return tuple(names)


def require_same_classes(train: Iterable[str], val: Iterable[str]) -> None:
    """Refuse splits of different classes: labels would mean different things.

    Raises:
        DataError: One of them lacks classes of the other.
    """
    for there, missing in (
        ("val", sorted(set(train) - set(val))),
        ("train", sorted(set(val) - set(train))),
    ):
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(f"train/ and val/ need the same classes: {there} lacks {names}")


def image_files(folder: Path) -> list[str]:
    """The names of the images in a class folder, sorted.

    Raises:
        DataError: There are none.
    """
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if is_image(e.name) and not e.is_dir())
    if not names:
        raise DataError(
            f"class folder {folder} has no images ({' '.join(EXTENSIONS)}): "
            "fill it, or remove the class from train/ and val/"
        )
    return names


def is_image(name: str) -> bool:
    """Whether a file's name is an image's."""
    return name.lower().endswith(EXTENSIONS)


def _split(root: Path, class_names: tuple[str, ...], size: int) -> Split:
    files = [image_files(root / class_name) for class_name in class_names]
    labels = np.repeat(np.arange(len(files)), [len(names) for names in files])
    encoded = np.array([os.fsencode(name) for names in files for name in names])
    return Split(FolderImages(root, class_names, labels, encoded, size), labels)
