"""A folder of images: ``train/`` and ``val/``, one folder per class in each."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexkern.data.dataset import BUILT_IN, DataError, Split

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")


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
        return decode(self._path(int(index)), self._size)

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
    train_classes, val_classes = _class_names(root / "train"), _class_names(root / "val")
    for there, missing in (
        ("val", sorted(set(train_classes) - set(val_classes))),
        ("train", sorted(set(val_classes) - set(train_classes))),
    ):
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(f"train/ and val/ need the same classes: {root / there} lacks {names}")
    train, val = (_split(root / name, train_classes, size) for name in ("train", "val"))
    return train_classes, train, val


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """One image file as uint8 RGB [size, size, 3].

    Raises:
        DataError: It cannot be read or decoded; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            # One resampling of the central square: scaling it whole first gives the same pixels.
            square = image.convert("RGB").resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
            )
    except Exception as error:  # Pillow's decoders raise many types
        reason = " ".join(str(error).split())
        raise DataError(f"cannot decode {path} ({reason}): replace or remove this file") from error
    return np.asarray(square)


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: --data needs train/ and val/, one folder per class")
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(f"no class folders in {folder}: put each class's images in its own folder")
    return tuple(names)


def _split(root: Path, class_names: tuple[str, ...], size: int) -> Split:
    names: list[bytes] = []
    counts = []
    for class_name in class_names:
        with os.scandir(root / class_name) as entries:
            files = sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS))
        if not files:
            raise DataError(
                f"class folder {root / class_name} has no images ({' '.join(EXTENSIONS)}): "
                "fill it, or remove the class from train/ and val/"
            )
        names += [os.fsencode(name) for name in files]
        counts.append(len(files))
    labels = np.repeat(np.arange(len(class_names)), counts)
    return Split(FolderImages(root, class_names, labels, np.array(names), size), labels)
