"""``alexkern prepare``: images to a store (see :mod:`alexkern.data.store`).

The source is cut into parts of ``PART_IMAGES``, and worker processes write a part each. While that
goes on, the folder ``unfinished`` in the store holds the plan (what is prepared from what), and for
each part that is done a record of its labels, refused images and exact sums. A part without a
record does not exist; everything else follows from the records, and so does not depend on how
often, where and by how many workers the work was taken up again. The manifest comes last.
"""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from alexkern.data.colours import principal_colours
from alexkern.data.dataset import DataError
from alexkern.data.decode import ImageError, decode
from alexkern.data.sources import Item, Source, list_source
from alexkern.data.store import MANIFEST, UNFINISHED, VERSION, read_manifest, sealed
from alexkern.files import replacing

PART_IMAGES = 1024
_PLAN = "plan.json"


class _Part(NamedTuple):
    """What a worker needs to write a part: ``items`` of the source, and their classes."""

    split: str
    number: int
    items: list[Item]
    labels: list[int]
    source: Path
    store: Path
    size: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    @property
    def file(self) -> Path:
        return self.store / f"{self.name}.npy"

    @property
    def record(self) -> Path:
        return self.store / UNFINISHED / f"{self.name}.json"

    @property
    def sums(self) -> Path:
        """Of each pixel over the part's images; for the training split alone."""
        return self.store / UNFINISHED / f"{self.name}-sums.npy"

    @property
    def has_sums(self) -> bool:
        return self.split == "train"

    def is_done(self) -> bool:
        if not self.record.exists():
            return False
        size = json.loads(self.record.read_bytes())["bytes"]
        return self.file.exists() and self.file.stat().st_size == size


def prepare(
    source: Path, store: Path, size: int = 256, workers: int = 1, ground_truth: Path | None = None
) -> None:
    """Prepare all images of a source, or go on where an earlier call ended; print a report.

    Args:
        source: What to read (see :func:`~alexkern.data.sources.list_source`).
        store: Folder to write; new, empty, or begun by the same call.
        size: Side of the stored images.
        workers: Number of processes; they change nothing but the time that it takes.
        ground_truth: Classes of validation images that are in no class folders.

    Raises:
        DataError: It cannot be done; one line that names the fix.
    """
    listed = list_source(source, ground_truth)
    plan = {
        "version": VERSION,
        "size": size,
        "part_images": PART_IMAGES,
        "resampling": "bilinear",
        "pillow": PIL.__version__,
        "source": listed.digest(),
    }
    try:
        manifest = _known(store, plan) or _prepare(listed, store, plan, workers)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or store} ({error.strerror or error}): once that is "
            "mended, the same command goes on from here"
        ) from error
    _report(store, manifest)


def _known(store: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished store of this plan; refuses folders that hold anything else."""
    if (store / MANIFEST).exists():
        manifest = read_manifest(store)
        _require_same(store, manifest, plan)
        shutil.rmtree(store / UNFINISHED, ignore_errors=True)
        return manifest
    begun = (store / UNFINISHED / _PLAN).exists()
    if store.exists() and not begun and set(os.listdir(store)) - {UNFINISHED}:
        raise DataError(f"{store} holds other files: choose a new or an empty folder")
    return None


def _require_same(store: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            difference = f"with {key} {before.get(key)}, not {value}"
            if key == "source":
                difference = "from other images (names, sizes or classes differ)"
            raise DataError(f"{store} was made {difference}: choose another folder, or remove it")


def _prepare(source: Source, store: Path, plan: dict[str, Any], workers: int) -> dict[str, Any]:
    """Do what is left to do; the manifest."""
    unfinished = store / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    with _alone(store):
        for stale in (*store.glob("*.tmp"), *unfinished.glob("*.tmp")):
            stale.unlink()
        if (unfinished / _PLAN).exists():
            _require_same(store, json.loads((unfinished / _PLAN).read_bytes()), plan)
        else:
            _write(unfinished / _PLAN, json.dumps(plan).encode())
        parts = list(_parts(source, store, plan["size"]))
        missing = [part for part in parts if not part.is_done()]
        _require_space(store, missing)
        _write_parts(missing, workers, sum(len(part.items) for part in parts))
        manifest = _finish(source, store, plan, parts)
        shutil.rmtree(unfinished)
    return manifest


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """The lock goes with the process, however that ends."""
    with open(store / UNFINISHED / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another alexkern prepare is at work in {store}: let it end, or stop it"
            raise DataError(message) from None
        yield


def _parts(source: Source, store: Path, size: int) -> Iterator[_Part]:
    for split, listing in source.splits.items():
        for number, first in enumerate(range(0, len(listing.items), PART_IMAGES)):
            some = slice(first, first + PART_IMAGES)
            items, labels = listing.items[some], listing.labels[some].tolist()
            yield _Part(split, number, items, labels, source.root, store, size)


def _require_space(store: Path, missing: Sequence[_Part]) -> None:
    needed = sum(
        (len(part.items) + part.has_sums * 4) * part.size**2 * 3  # sums have four bytes each
        for part in missing
    )
    free = shutil.disk_usage(store).free
    if needed > free:
        raise DataError(
            f"{store} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room, "
            "or choose another disk"
        )


def _write_parts(missing: Sequence[_Part], workers: int, total: int) -> None:
    """Let worker processes write the parts that are missing; ``total`` counts all images."""
    if not missing:
        return
    # Forked from a server that has imported this module (and with it torch, for which many workers
    # would else need minutes and gigabytes), and knows nothing of the state of this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(missing)), context, _begin_worker, (theirs,))
    done = total - sum(len(part.items) for part in missing)
    bar = tqdm(desc="preparing", total=total, initial=done, unit=" images", disable=None)
    try:
        with bar:
            futures = [pool.submit(_write_part, part) for part in missing]
            for future in as_completed(futures):
                bar.update(future.result())
    except (BrokenProcessPool, MemoryError) as error:
        gigabytes = PART_IMAGES * missing[0].size ** 2 * 3 / 1e9
        raise DataError(
            f"a worker process died, perhaps for want of memory (each needs {gigabytes:.1f} GB "
            "and what the largest image takes): the same command goes on from here, and may get "
            "fewer --workers"
        ) from error
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)


def _begin_worker(pipe: Connection) -> None:
    signal(SIGINT, SIG_IGN)  # a terminal's reaches every process; the first one decides
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()


def _end_with(pipe: Connection) -> None:
    """The other end closes when the work is to stop, and when the first process is killed.

    Left to itself a worker would finish its part in the one case, and wait for work for ever in the
    other; and the pool waits for ever for one that it started while another died.
    """
    with suppress(EOFError):
        pipe.recv()
    os._exit(1)


def _write_part(part: _Part) -> int:
    """Write a part, and then its record; the number of images in the source."""
    images = np.empty((len(part.items), part.size, part.size, 3), np.uint8)
    labels: list[int] = []
    refused: list[tuple[str, str]] = []
    for item, label in zip(part.items, part.labels, strict=True):
        try:
            images[len(labels)] = decode(io.BytesIO(item.read(part.source)), part.size)
        except ImageError as error:
            refused.append((item.name, str(error)))
        else:
            labels.append(label)
    images = images[: len(labels)]
    record = {"images": len(images), **_write_array(part.file, images)}
    record |= {"labels": labels, "refused": refused}
    if part.has_sums:
        _write_array(part.sums, images.sum(0, dtype=np.uint32))
        products = sum(map(_channel_products, images), np.zeros((3, 3), np.int64))
        record["products"] = products.tolist()
    _write(part.record, json.dumps(record).encode())
    return len(part.items)


def _finish(
    source: Source, store: Path, plan: dict[str, Any], parts: Sequence[_Part]
) -> dict[str, Any]:
    """Write what follows from the records, and the manifest last."""
    size = plan["size"]
    splits = {
        split: _finish_split(source, store, split, [part for part in parts if part.split == split])
        for split in source.splits
    }
    pixel_sums = np.zeros((size, size, 3), np.int64)
    products = np.zeros((3, 3), np.int64)
    for part in parts:
        if part.has_sums:
            pixel_sums += np.load(part.sums)
            products += json.loads(part.record.read_bytes())["products"]
    count = splits["train"]["images"]
    covariance = _covariance(count * size**2, pixel_sums.sum((0, 1)), products)
    components = principal_colours(covariance)
    mean = (pixel_sums / count).astype(np.float32)
    manifest = {
        **plan,
        "class_names": source.class_names,
        "splits": splits,
        "left_out": source.left_out,
        "mean": _write_array(store / "mean.npy", mean),
        "covariance": covariance.tolist(),
        "eigenvectors": components.eigenvectors.tolist(),
        "deviations": components.deviations.tolist(),
    }
    _write(store / MANIFEST, sealed(manifest))
    return manifest


def _finish_split(
    source: Source, store: Path, split: str, parts: Sequence[_Part]
) -> dict[str, Any]:
    """Write the labels; the split's entry in the manifest."""
    records = [json.loads(part.record.read_bytes()) for part in parts]
    labels = [label for record in records for label in record["labels"]]
    refused = [entry for record in records for entry in record["refused"]]
    lost = sorted(set(range(len(source.class_names))) - set(labels))
    if lost:
        _print_refused(refused)
        names = ", ".join(source.class_names[label] for label in lost[:5])
        raise DataError(
            f"every image of {len(lost)} classes in {split} was refused ({names}"
            f"{', ...' if len(lost) > 5 else ''}): mend them, or remove the classes"
        )
    kept = ("file", "images", "bytes", "sha256")
    return {
        "images": len(labels),
        "labels": _write_array(store / f"{split}-labels.npy", np.array(labels, np.int64)),
        "refused": refused,
        "parts": [{key: record[key] for key in kept} for record in records],
    }


def _channel_products(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each pair of channels the exact sum of their product over all pixels, int64 [3, 3].

    Args:
        image: uint8 [height, width, 3].
    """
    channels = np.ascontiguousarray(image.reshape(-1, 3).T).astype(np.uint16)
    products = np.empty((3, 3), np.int64)
    for row in range(3):
        for column in range(row, 3):
            product = channels[row] * channels[column]  # at most 255 * 255, which 16 bits hold
            products[row, column] = products[column, row] = product.sum(dtype=np.int64)
    return products


def _covariance(
    pixels: int, sums: NDArray[np.int64], products: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The covariance of red, green and blue, float64 [3, 3], each entry rounded once.

    Args:
        pixels: Number of pixels.
        sums: Sum of each channel over them, int64 [3].
        products: Sum of each pair's product over them, int64 [3, 3].
    """
    total = [int(value) for value in sums]  # Python's integers do not overflow
    rows = [
        [(pixels * int(products[a, b]) - total[a] * total[b]) / pixels**2 for b in range(3)]
        for a in range(3)
    ]
    return np.array(rows)


def _write_array(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    """Write an .npy file; its entry in the manifest."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    # Not np.save: it loses the reason where a disk is full.
    return _write(path, header.getvalue(), array.data)


def _write(path: Path, *contents: bytes | memoryview) -> dict[str, Any]:
    digest = hashlib.sha256()
    with replacing(path) as file:
        for content in contents:
            digest.update(content)
            file.write(content)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _report(store: Path, manifest: dict[str, Any]) -> None:
    splits, size = manifest["splits"], manifest["size"]
    for entry in splits.values():
        _print_refused(entry["refused"])
    left_out = manifest["left_out"]
    for name in left_out[:10]:
        print(f"left out {_printable(name)}: no image by its name")
    if len(left_out) > 10:
        print(f"left out {len(left_out)} in all: see left_out in {store / MANIFEST}")
    refused = sum(len(entry["refused"]) for entry in splits.values())
    print(
        f"{store}: {splits['train']['images']:,} training and {splits['val']['images']:,} "
        f"validation images of {size}x{size} pixels in {len(manifest['class_names'])} classes; "
        f"{refused} refused"
    )


def _print_refused(refused: Sequence[Sequence[str]]) -> None:
    for name, reason in refused:
        print(f"refused {_printable(name)}: {reason}")


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
