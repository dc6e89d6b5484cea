"""Images for training: built-in sets, image folders, and batches with their augmentation."""

from alexkern.data.batches import (
    Batch,
    Batches,
    evaluation_batches,
    iterate,
    training_batches,
)
from alexkern.data.dataset import DataError, Dataset, Images, Split, load_dataset
from alexkern.data.seeds import derive_seed

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "Dataset",
    "Images",
    "Split",
    "derive_seed",
    "evaluation_batches",
    "iterate",
    "load_dataset",
    "training_batches",
]
