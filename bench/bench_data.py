"""Images per second of the data pipeline on one core, at the paper's sizes.

Training: crops from a prepared store, beside what is usual with torchvision: its ImageFolder,
decoded, cropped to a random size, scaled and mirrored anew each time. Preparing: the same work
from the same files, ours and torchvision's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexkern import ops
from alexkern.data import Augmentation, Batches, Split, iterate, load_dataset, training_batches
from alexkern.data.store import StoreImages
from alexkern.models import PRESETS
from bench.conftest import Keep
from bench.layers import BATCH
from bench.record import Key

PAPER = PRESETS["paper"]
VARIANTS, FULL_VARIANTS = ("alexkern", "torchvision"), ()

# As many parts as ImageNet's training images have. Here all are one file, mapped anew for each: the
# accesses are those of the whole, and no disk is measured.
PARTS, PART_IMAGES = 1252, 256


@pytest.fixture(autouse=True)
def _one_core() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _key(step: str, variant: str = "alexkern") -> Key:
    return Key("data", "data", step, "", "", BATCH, variant)


def _batches(split: Split) -> Batches:
    offsets = PAPER.stored_size - PAPER.crop_size + 1
    noise = 10 * np.eye(3)
    augmentation = Augmentation(PAPER.crop_size, offsets, flip=True, colour_noise=noise)
    return training_batches(split, 0, 0, BATCH, augmentation)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """A training split of ImageNet's size."""
    path = tmp_path_factory.mktemp("store") / "part.npy"
    shape = (PART_IMAGES, PAPER.stored_size, PAPER.stored_size, 3)
    np.save(path, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    images = StoreImages([path] * PARTS, [PART_IMAGES] * PARTS, PAPER.stored_size)
    return Split(images, np.zeros(len(images), np.int64))


def test_batch_to_input(benchmark: Any, keep: Keep, store: Split) -> None:
    """The float work, which belongs on the GPU where there is one."""
    batch = next(iterate(_batches(store)))
    mean = torch.full((PAPER.crop_size, PAPER.crop_size, 3), 120.0)
    corners = torch.zeros(BATCH, 2, dtype=torch.int64)
    benchmark(lambda: ops.augment(batch.images, corners, batch.flips, mean, 1.0, batch.shift))
    keep(_key("batch_to_input"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch of 500x375 JPEG files, as ImageNet's are on average."""
    image_module = pytest.importorskip("PIL.Image", reason="needs pillow: pip install '.[train]'")
    root = tmp_path_factory.mktemp("jpeg")
    low = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    picture = image_module.fromarray(low).resize((500, 375), image_module.Resampling.BICUBIC)
    for split in ("train", "val"):
        (root / split / "class").mkdir(parents=True)
        for index in range(BATCH if split == "train" else 1):
            picture.save(root / split / "class" / f"{index}.jpg", quality=90)
    return root


def _torchvision(folder: Path, *names: Any) -> Callable[[], torch.Tensor]:
    """A batch of its ImageFolder through transforms, each named with its arguments."""
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
        pytest.skip(f"needs a torchvision that fits torch: {str(error).splitlines()[0]}")
    steps = [getattr(v2, name)(*arguments) for name, *arguments in names]
    images = ImageFolder(folder / "train", v2.Compose(steps))
    return lambda: torch.stack([images[index][0] for index in range(BATCH)])


def test_training_batch(
    benchmark: Any, keep: Keep, store: Split, folder: Path, variant: str
) -> None:
    """uint8 crops of 224x224, of random images, at random places and mirrored at random.

    Mirroring itself is the GPU's in this library.
    """
    size = PAPER.crop_size
    if variant == "alexkern":
        batches = _batches(store)
        indices = iter(range(len(batches)))

        def make() -> torch.Tensor:
            batch = batches[next(indices)]
            assert not isinstance(batch, Exception)
            return batch.images

    else:
        make = _torchvision(
            folder, ("RandomResizedCrop", size), ("RandomHorizontalFlip",), ("PILToTensor",)
        )
    assert sorted(make().shape) == sorted((BATCH, size, size, 3))
    benchmark(make)
    keep(_key("training_batch", variant))


def test_jpeg_folder_to_batch(benchmark: Any, keep: Keep, folder: Path, variant: str) -> None:
    """Decoded, shorter side to 256, centre of 256x256, one uint8 batch: what preparing is."""
    size = PAPER.stored_size
    if variant == "alexkern":
        images = load_dataset(str(folder), size).train.images
        make: Callable[[], Any] = lambda: np.stack([images[index] for index in range(BATCH)])  # noqa: E731
    else:
        make = _torchvision(folder, ("Resize", size), ("CenterCrop", size), ("PILToTensor",))
    assert sorted(make().shape) == sorted((BATCH, size, size, 3))
    benchmark(make)
    keep(_key("jpeg_folder_to_batch", variant))
