"""Images for training: built-in sets, image folders, and batches of augmented crops."""

from alexkern.data.batches import (
    Batch,
    Batches,
    evaluation_batches,
    iterate,
    to_input,
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
    "to_input",
    "training_batches",
]
