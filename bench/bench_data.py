"""Images per second of the data pipeline on one core, per step, at the paper's sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexkern.data.batches import to_input, training_batches
from alexkern.data.dataset import Split, load_dataset
from alexkern.models import PRESETS
from bench.layers import BATCH

PAPER = PRESETS["paper"]


@pytest.fixture(autouse=True)
def _one_core() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _crops(split: Split) -> Any:
    margin = PAPER.stored_size - PAPER.crop_size
    return training_batches(split, 0, 0, BATCH, PAPER.crop_size, margin, flip=True)


def test_stored_images_to_crops(benchmark: Any, images_per_second: Any) -> None:
    """From uint8 images in memory to a batch of random crops and flips."""
    shape = (2 * BATCH, PAPER.stored_size, PAPER.stored_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batches = _crops(Split(images, np.zeros(len(images), np.int64)))
    benchmark(lambda: batches[1])
    images_per_second(BATCH)


def test_jpeg_folder_to_crops(benchmark: Any, images_per_second: Any, tmp_path: Path) -> None:
    """From a folder of 500x375 JPEG files: decoded, resized to 256, cropped, flipped."""
    image_module = pytest.importorskip("PIL.Image", reason="needs pillow: pip install '.[train]'")
    low = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    picture = image_module.fromarray(low).resize((500, 375), image_module.Resampling.BICUBIC)
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        for index in range(BATCH if split == "train" else 1):
            picture.save(tmp_path / split / "class" / f"{index}.jpg", quality=90)
    batches = _crops(load_dataset(str(tmp_path), PAPER.stored_size).train)
    benchmark(lambda: batches[0])
    images_per_second(BATCH)


def test_crops_to_input(benchmark: Any, images_per_second: Any) -> None:
    """The float work, which belongs on the GPU where there is one."""
    crops = torch.randint(256, (BATCH, PAPER.crop_size, PAPER.crop_size, 3), dtype=torch.uint8)
    mean = torch.full((PAPER.stored_size, PAPER.stored_size, 3), 120.0)
    benchmark(lambda: to_input(crops, mean, PAPER.input_std))
    images_per_second(BATCH)
