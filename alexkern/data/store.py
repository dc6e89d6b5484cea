"""The store that ``alexkern prepare`` makes: images ready to be cropped, mapped into memory.

``manifest.json`` names everything: format version, size of the images, classes, and for each split
its images in parts (``train-00000.npy``, uint8 [n, size, size, 3]), their labels
(``train-labels.npy``, int64) and what was refused; the mean image (``mean.npy``, float32), the
covariance of the colours and its principal components; size and SHA-256 of every file. It is
written last and seals itself, so a store is whole if its manifest is.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexkern.data.colours import Colours
from alexkern.data.dataset import DataError, Dataset, Split

VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # the folder in a store that prepare works in

# Parts that one process maps at a time. All of ImageNet's would need more open files than many
# systems allow, and page tables of half a gigabyte in each process that reads.
MAPPED_PARTS = 256


def is_store(path: Path) -> bool:
    """Whether a folder is a store, be it whole or not."""
    return (path / MANIFEST).exists() or (path / UNFINISHED).exists()


def open_store(path: Path, size: int) -> Dataset:
    """Open a store; the images stay on disk until they are used.

    The files must have the sizes that the manifest tells. What is in them is checked by
    :func:`check_store`, which has to read it all.

    Args:
        path: The store.
        size: Side of the images that are wanted.

    Raises:
        DataError: The store is unfinished, damaged, of a newer format or of another size.
    """
    manifest = read_manifest(path)
    if manifest["size"] != size:
        raise DataError(
            f"{path} holds images of {manifest['size']} pixels, and {size} are wanted: choose "
            f"another preset, or prepare the images again with --size {size}"
        )
    for file in files(manifest):
        if problem := _wrong_size(path, file):
            raise DataError(f"{path}: {problem}: the store is damaged, prepare it again")
    colours = Colours(
        np.array(manifest["eigenvectors"], np.float32),
        np.array(manifest["deviations"], np.float32),
    )
    train, val = (_split(path, manifest, name) for name in ("train", "val"))
    class_names = tuple(manifest["class_names"])
    mean = _load(path / manifest["mean"]["file"])
    return Dataset(str(path), class_names, train, val, True, mean, colours)


class StoreImages:
    """The images of one split: views of files that are mapped into memory.

    Args:
        paths: The parts, .npy files that end with their pixels.
        counts: Images in each.
        size: Side of the images.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], size: int) -> None:
        self._arguments = paths, counts, size
        self._starts = [0, *accumulate(counts)]
        self._part = lru_cache(MAPPED_PARTS)(self._map)

    def __reduce__(self) -> tuple[Any, ...]:
        """For loaders that start their processes anew: each maps for itself."""
        return StoreImages, self._arguments

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = bisect_right(self._starts, index) - 1
        image: NDArray[np.uint8] = self._part(part)[index - self._starts[part]]
        return image

    def _map(self, part: int) -> NDArray[np.uint8]:
        paths, counts, size = self._arguments
        shape = (counts[part], size, size, 3)
        try:
            with open(paths[part], "rb", buffering=0) as file:
                mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot read {paths[part]} ({error.strerror})") from error
        header = len(mapped) - counts[part] * size * size * 3
        return np.frombuffer(mapped, np.uint8, offset=header).reshape(shape)


def check_store(path: Path, workers: int = 1) -> list[str]:
    """Read a whole store; a line for each thing that is wrong with it.

    Args:
        path: The store.
        workers: Number of files that are read at a time.

    Raises:
        DataError: The manifest, by which everything else is checked, is missing or damaged.
    """
    from tqdm import tqdm

    manifest = read_manifest(path)
    entries = files(manifest)
    with ThreadPoolExecutor(workers) as pool:  # hashing lets other threads run
        checked = pool.map(lambda entry: _damage(path, entry), entries)
        bar = tqdm(checked, "checking", len(entries), unit=" files", leave=False, disable=None)
        problems = [problem for problem in bar if problem]
    return problems or _contradictions(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        DataError: There is none, or it is damaged, or of a newer format.
    """
    file = path / MANIFEST
    if not file.is_file():
        what = "an unfinished store" if (path / UNFINISHED).is_dir() else "no store"
        raise DataError(f"{path} is {what}: it has no {MANIFEST}, which alexkern prepare writes")
    try:
        content = file.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        version = manifest["version"]
        whole = sealed(manifest) == content
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        version, whole = VERSION, False
    if isinstance(version, int) and version > VERSION:
        raise DataError(
            f"{file} has format {version}, and this alexkern knows {VERSION}: install a newer one"
        )
    if not whole:
        raise DataError(
            f"{file} is damaged, or no manifest of alexkern prepare: prepare the images again"
        )
    return manifest


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written: with the SHA-256 of itself, taken while that is empty."""
    blank = json.dumps({**manifest, "sha256": ""}, indent=1).encode()
    digest = hashlib.sha256(blank).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries (``file``, ``bytes``, ``sha256``) of all files that a manifest names."""
    found = [manifest["mean"]]
    for split in manifest["splits"].values():
        found += [split["labels"], *split["parts"]]
    return found


def _split(path: Path, manifest: Mapping[str, Any], name: str) -> Split:
    entry, classes = manifest["splits"][name], len(manifest["class_names"])
    paths = [path / part["file"] for part in entry["parts"]]
    images = StoreImages(paths, [part["images"] for part in entry["parts"]], manifest["size"])
    labels = _load(path / entry["labels"]["file"])
    if labels.min() < 0 or labels.max() >= classes:  # a GPU would say so less clearly
        raise DataError(f"{path / entry['labels']['file']} has labels beyond {classes} classes")
    return Split(images, labels)


def _load(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path)
    except Exception as error:  # of whatever a damaged header makes numpy think
        raise DataError(f"cannot read {path}: the store is damaged, prepare it again") from error
    return array


def _wrong_size(path: Path, entry: Mapping[str, Any]) -> str:
    name, expected = entry["file"], entry["bytes"]
    try:
        found = (path / name).stat().st_size
    except OSError as error:
        return f"{name}: {error.strerror}"
    return "" if found == expected else f"{name} has {found} bytes, not {expected}"


def _damage(path: Path, entry: Mapping[str, Any]) -> str:
    if problem := _wrong_size(path, entry):
        return problem
    try:
        with open(path / entry["file"], "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{entry['file']}: {error.strerror}"
    return "" if digest == entry["sha256"] else f"{entry['file']} is damaged (SHA-256 differs)"


def _contradictions(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Where whole files do not fit the manifest or each other."""
    size, classes = manifest["size"], len(manifest["class_names"])
    expected: dict[str, tuple[type, tuple[int, ...]]] = {}
    expected[manifest["mean"]["file"]] = (np.float32, (size, size, 3))
    problems = []
    for split in manifest["splits"].values():
        if sum(part["images"] for part in split["parts"]) != split["images"]:
            problems.append(f"{MANIFEST}: parts do not add up to {split['images']} images")
        for part in split["parts"]:
            expected[part["file"]] = (np.uint8, (part["images"], size, size, 3))
        expected[split["labels"]["file"]] = (np.int64, (split["images"],))
    for name, (dtype, shape) in expected.items():
        array = np.load(path / name, mmap_mode="r")
        if (array.dtype, array.shape) != (dtype, shape):
            problems.append(f"{name} is {array.dtype} {array.shape}, not {dtype} {shape}")
    for split in manifest["splits"].values():
        name = split["labels"]["file"]
        if set(np.load(path / name).tolist()) != set(range(classes)):
            problems.append(f"{name}: labels are not all of 0 to {classes - 1}, and no others")
    return problems
