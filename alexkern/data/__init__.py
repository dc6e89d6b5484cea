"""Images for training: built-in sets, image folders, and batches with their augmentation."""

from alexkern.data.batches import (
    Augmentation,
    Batch,
    Batches,
    evaluation_batches,
    iterate,
    on_device,
    training_batches,
)
from alexkern.data.colours import Colours, principal_colours
from alexkern.data.dataset import DataError, Dataset, Images, Split, load_dataset
from alexkern.data.seeds import derive_seed

__all__ = [
    "Augmentation",
    "Batch",
    "Batches",
    "Colours",
    "DataError",
    "Dataset",
    "Images",
    "Split",
    "derive_seed",
    "evaluation_batches",
    "iterate",
    "load_dataset",
    "on_device",
    "principal_colours",
    "training_batches",
]
