"""Images per second of the data pipeline on one core, per step, at the paper's sizes.

From a folder of JPEG files it stands beside torchvision's: the same step from the same files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexkern import ops
from alexkern.data import Augmentation, Batches, Split, iterate, load_dataset, training_batches
from alexkern.models import PRESETS
from bench.conftest import Keep
from bench.layers import BATCH
from bench.record import Key

PAPER = PRESETS["paper"]
VARIANTS, FULL_VARIANTS = ("alexkern", "torchvision"), ()


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
    return training_batches(split, 0, 0, BATCH, Augmentation(PAPER.crop_size, offsets, flip=True))


def _in_memory() -> Batches:
    shape = (2 * BATCH, PAPER.stored_size, PAPER.stored_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return _batches(Split(images, np.zeros(len(images), np.int64)))


def test_stored_images_to_batch(benchmark: Any, keep: Keep) -> None:
    """From uint8 images in memory to a batch of them, with random corners and flips."""
    batches = _in_memory()
    benchmark(lambda: batches[1])
    keep(_key("stored_images_to_batch"))


def test_batch_to_input(benchmark: Any, keep: Keep) -> None:
    """The float work, which belongs on the GPU where there is one."""
    (batch,) = iterate(_in_memory(), first=1)
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


def _alexkern(folder: Path) -> Callable[[], torch.Tensor]:
    batches = _batches(load_dataset(str(folder), PAPER.stored_size).train)
    return lambda: next(iterate(batches)).images


def _torchvision(folder: Path) -> Callable[[], torch.Tensor]:
    """Its ImageFolder, and its transforms for the paper's preparation."""
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
        pytest.skip(f"needs a torchvision that fits torch: {str(error).splitlines()[0]}")
    size = PAPER.stored_size
    prepare = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    images = ImageFolder(folder / "train", prepare)
    return lambda: torch.stack([images[index][0] for index in range(BATCH)])


def test_jpeg_folder_to_batch(benchmark: Any, keep: Keep, folder: Path, variant: str) -> None:
    """Decoded, shorter side to 256, centre of 256x256, one uint8 batch."""
    make = {"alexkern": _alexkern, "torchvision": _torchvision}[variant](folder)
    size = PAPER.stored_size
    assert sorted(make().shape) == sorted((BATCH, size, size, 3))
    benchmark(make)
    keep(_key("jpeg_folder_to_batch", variant))
