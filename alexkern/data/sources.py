"""What ``alexkern prepare`` reads: class folders, or ILSVRC's archives, read in place."""

import hashlib
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alexkern.data.dataset import DataError
from alexkern.data.decode import ImageError
from alexkern.data.folder import (
    EXTENSIONS,
    class_folders,
    image_files,
    is_image,
    require_same_classes,
)
from alexkern.data.ground_truth import find_ground_truth, read_ground_truth

SPLITS = ("train", "val")

_Class = TypeVar("_Class")


class Item(NamedTuple):
    """Where an image is.

    Attributes:
        name: Path in the source; an archive counts as a folder there.
        archive: The archive's path in the source, empty if the image is a file of its own.
        offset: First byte in that file.
        size: In bytes; -1 if there is nothing to read, as for a link that leads nowhere.
    """

    name: str
    archive: str
    offset: int
    size: int

    @property
    def file_name(self) -> str:
        """The last part of the name."""
        return self.name.rsplit("/", 1)[-1]

    def read(self, root: Path) -> bytes:
        """The image's file, still encoded.

        Args:
            root: The source.

        Raises:
            ImageError: There is nothing that may be read.
            DataError: The source is no longer what it was when it was listed.
        """
        if self.size < 0:
            raise ImageError("no file, or a link that leads to none")
        try:
            with open(root / (self.archive or self.name), "rb") as file:
                file.seek(self.offset)
                # A byte more would show that the file has grown.
                content = file.read(self.size if self.archive else self.size + 1)
        except PermissionError as error:
            raise ImageError("permission denied") from error
        except OSError as error:
            raise DataError(f"cannot read {root / self.name} ({error.strerror})") from error
        if len(content) != self.size:
            raise DataError(f"{root / self.name} has changed since the images were listed")
        return content


@dataclass(frozen=True)
class Listing:
    """The images of a split, in a fixed order.

    Attributes:
        items: N images.
        labels: Class of each, int64 [N].
    """

    items: list[Item]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """All that is to be prepared.

    Attributes:
        root: The folder.
        class_names: Sorted, as torchvision's and Caffe's labels are.
        splits: ``train`` and ``val``.
        left_out: Files and folders that are no images by their names.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, Listing]
    left_out: list[str]

    def digest(self) -> str:
        """SHA-256 of all names, sizes and labels."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for name, listing in self.splits.items():
            digest.update(name.encode())
            for item, label in zip(listing.items, listing.labels.tolist(), strict=True):
                digest.update(json.dumps([*item, label]).encode())
        return digest.hexdigest()


def list_source(root: Path, ground_truth: Path | None = None) -> Source:
    """List the images of a folder.

    Args:
        root: Has ``train/`` with class folders or ``ILSVRC2012_img_train.tar``, an archive of one
            archive per class; and ``val/`` with class folders or without, or
            ``ILSVRC2012_img_val.tar`` (other years alike).
        ground_truth: Of validation images that are in no class folders (see
            :func:`~alexkern.data.ground_truth.read_ground_truth`); looked for in ``root`` if None.

    Raises:
        DataError: Something is missing or does not fit; one line that names the fix.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}: SRC has train/ and val/, or ILSVRC's archives")
    try:
        return _list(root, ground_truth)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror}") from error


def _list(root: Path, ground_truth: Path | None) -> Source:
    train, val = (_place(root, split) for split in SPLITS)
    left_out: list[str] = []
    if train.is_dir():
        train_classes = _class_items(root, train, left_out)
    else:
        train_classes = _archived_classes(train, left_out)
    class_names = tuple(sorted(train_classes))

    if val.is_dir() and _has_folders(val):
        if ground_truth:
            raise DataError(f"{val} has class folders: leave --ground-truth out")
        val_classes = _class_items(root, val, left_out)
    else:
        items = _flat_items(root, val, left_out)
        truth = ground_truth or find_ground_truth(root)
        named = read_ground_truth(truth, [item.file_name for item in items], class_names)
        val_classes = {}
        for item, class_name in zip(items, named, strict=True):
            val_classes.setdefault(class_name, []).append(item)
    require_same_classes(class_names, val_classes)
    splits = {"train": _listing(train_classes), "val": _listing(val_classes)}
    return Source(root, class_names, splits, left_out)


def _listing(classes: dict[str, list[Item]]) -> Listing:
    """Class by class, whatever the order in the source."""
    items = [item for class_name in sorted(classes) for item in classes[class_name]]
    counts = [len(classes[class_name]) for class_name in sorted(classes)]
    return Listing(items, np.repeat(np.arange(len(classes)), counts))


def _place(root: Path, split: str) -> Path:
    """The folder or archive of a split."""
    pattern = re.compile(rf"ILSVRC\d{{4}}_(img|images)_{split}\.tar")
    found = sorted(path for path in root.iterdir() if pattern.fullmatch(path.name))
    if (root / split).is_dir():
        found.append(root / split)
    if not found:
        raise DataError(f"{root} has neither {split}/ nor ILSVRC2012_img_{split}.tar")
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{root} has {names}, which may hold the same images: move one away")
    return found[0]


def _has_folders(folder: Path) -> bool:
    return any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


def _class_items(root: Path, folder: Path, left_out: list[str]) -> dict[str, list[Item]]:
    """The images of each class folder, by file name."""
    classes = class_folders(folder)
    left_out += _others(root, folder, classes)
    found = {}
    for class_name in _progress(classes, folder.name):
        names = image_files(folder / class_name)
        left_out += _others(root, folder / class_name, names)
        found[class_name] = [_file(root, folder / class_name / name) for name in names]
    return found


def _flat_items(root: Path, place: Path, left_out: list[str]) -> list[Item]:
    """The images of a folder or an archive without classes, by file name."""
    if place.is_dir():
        names = sorted(path.name for path in place.iterdir() if is_image(path.name))
        left_out += _others(root, place, names)
        items = [_file(root, place / name) for name in names]
    else:
        members = _members(place, place.name, 0, place.stat().st_size)
        items = _archived(place, place.name, members, left_out)
    if not items:
        raise DataError(f"{place} has no images ({' '.join(EXTENSIONS)})")
    return items


def _archived_classes(archive: Path, left_out: list[str]) -> dict[str, list[Item]]:
    """The images of an archive of one archive per class, by class and file name."""
    found = {}
    outer = _members(archive, archive.name, 0, archive.stat().st_size)
    for member in _progress(outer, "train"):
        name = f"{archive.name}/{member.name}"
        if not member.name.endswith(".tar"):
            left_out.append(name)
            continue
        end = member.offset_data + member.size
        items = _archived(archive, name, _members(archive, name, member.offset_data, end), left_out)
        if not items:
            raise DataError(f"{name} has no images ({' '.join(EXTENSIONS)})")
        class_name = Path(member.name).stem
        if class_name in found:
            raise DataError(f"{archive} holds {class_name}.tar more than once")
        found[class_name] = items
    if not found:
        raise DataError(f"{archive} holds no archives of classes, as ILSVRC's does")
    return found


def _archived(
    archive: Path, name: str, members: Iterable[tarfile.TarInfo], left_out: list[str]
) -> list[Item]:
    """The images among an archive's members, by file name."""
    items = []
    for member in members:
        item = Item(f"{name}/{member.name}", archive.name, member.offset_data, member.size)
        if is_image(member.name):
            items.append(item)
        else:
            left_out.append(item.name)
    items.sort(key=lambda item: item.file_name)
    for one, other in pairwise(items):
        if one.file_name == other.file_name:
            raise DataError(f"{name} holds {one.file_name} more than once")
    return items


def _members(path: Path, name: str, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The files of the uncompressed archive in these bytes of a file.

    tarfile takes what it cannot read for the end of the archive, whose mark is a block of zeros.
    """
    damaged = DataError(f"{name} is cut off or damaged: fetch it again")
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from (member for member in tar if not member.isdir())
                file.seek(tar.offset)
            mark = file.read(max(0, min(tarfile.BLOCKSIZE, end - tar.offset)))
    except tarfile.TarError as error:
        raise damaged from error
    if mark != bytes(tarfile.BLOCKSIZE):
        raise damaged


def _file(root: Path, path: Path) -> Item:
    try:
        status = path.stat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    except OSError:  # a link that leads nowhere
        size = -1
    return Item(path.relative_to(root).as_posix(), "", 0, size)


def _others(root: Path, folder: Path, taken: Iterable[str]) -> list[str]:
    """What else is in a folder."""
    names = sorted(set(os.listdir(folder)) - set(taken))
    return [(folder / name).relative_to(root).as_posix() for name in names]


def _progress(classes: Iterable[_Class], split: str) -> Iterable[_Class]:
    """A bar, on a terminal: a thousand archives may take minutes."""
    bar: Iterable[_Class] = tqdm(
        classes, f"listing {split}", unit=" classes", leave=False, disable=None
    )
    return bar
