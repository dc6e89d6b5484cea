import numpy as np
import pytest
import torch

from alexkern import ops
from alexkern.data import (
    DataError,
    Split,
    evaluation_batches,
    iterate,
    load_dataset,
    training_batches,
)

SIZE, MARGIN, COUNT = 12, 4, 60


class Coordinates:
    """Each pixel holds its image's number, its row and its column."""

    def __len__(self):
        return COUNT

    def __getitem__(self, indices):
        images = np.empty((len(indices), SIZE, SIZE, 3), np.uint8)
        images[..., 0] = indices[:, None, None]
        images[..., 1] = np.arange(SIZE)[:, None]
        images[..., 2] = np.arange(SIZE)
        return images


SPLIT = Split(Coordinates(), np.arange(COUNT) % 7)


def epoch(seed=0, number=0, batch_size=16, flip=True, **kwargs):
    return list(iterate(training_batches(SPLIT, seed, number, batch_size, MARGIN, flip), **kwargs))


def views(batches):
    """(sample, top, left, flipped) of every crop, after checking that it is the sample's image."""
    found = []
    for batch in batches:
        samples = batch.images[:, 0, 0, 0].numpy()
        assert (batch.images.numpy() == SPLIT.images[samples]).all()
        dtypes = [torch.uint8, torch.int64, torch.bool, torch.int64]
        assert [tensor.dtype for tensor in batch] == dtypes
        assert (batch.labels.numpy() == samples % 7).all()
        corners, flips = batch.corners.tolist(), batch.flips.tolist()
        for sample, corner, flip in zip(samples.tolist(), corners, flips, strict=True):
            found.append((sample, *corner, flip))
    return found


def test_an_epoch_uses_whole_batches_of_distinct_samples():
    batches = epoch()
    assert [len(batch.labels) for batch in batches] == [16] * 3
    assert len({sample for sample, *_ in views(batches)}) == 48


def test_a_small_split_gives_one_batch():
    assert [len(batch.labels) for batch in epoch(batch_size=100)] == [COUNT]


def test_every_corner_and_reflection_occurs_alike():
    found = [view[1:] for number in range(60) for view in views(epoch(number=number))]
    kinds, counts = np.unique(np.array(found, int), axis=0, return_counts=True)
    assert len(kinds) == (MARGIN + 1) ** 2 * 2
    # 2880 draws of 50 kinds: 57.6 each, standard deviation 7.5.
    assert counts.min() > 57.6 - 5 * 7.5
    assert counts.max() < 57.6 + 5 * 7.5


def test_digits_are_not_mirrored():
    assert not any(flipped for *_, flipped in views(epoch(flip=False)))


def test_order_and_views_follow_seed_and_epoch():
    first = views(epoch())
    assert first == views(epoch())
    assert first != views(epoch(seed=1))
    second = views(epoch(number=1))
    assert [view[0] for view in first] != [view[0] for view in second]
    by_sample = {view[0]: view[1:] for view in second}
    assert any(view[1:] != by_sample.get(view[0], view[1:]) for view in first)


def test_a_view_does_not_depend_on_the_batch_size():
    small = {view[0]: view for view in views(epoch(batch_size=4))}
    assert all(small[view[0]] == view for view in views(epoch(batch_size=20)))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    for ours, theirs in zip(epoch(workers=workers), epoch(), strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_at_any_batch(workers):
    assert views(epoch(workers=workers, first=2)) == views(epoch())[32:]


def test_evaluation_takes_each_central_crop_once():
    batches = list(iterate(evaluation_batches(SPLIT, 16, MARGIN)))
    assert [len(batch.labels) for batch in batches] == [16, 16, 16, 12]
    assert views(batches) == [(sample, 2, 2, False) for sample in range(COUNT)]


class Broken(Coordinates):
    def __getitem__(self, indices):
        raise DataError("cannot decode x.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_with_its_one_line(workers):
    batches = evaluation_batches(Split(Broken(), SPLIT.labels), 16, MARGIN)
    with pytest.raises(DataError) as error:
        list(iterate(batches, workers))
    assert str(error.value) == "cannot decode x.png"


def test_digits_reach_the_network_at_unit_scale():
    dataset = load_dataset("digits", 36)
    batches = iterate(training_batches(dataset.train, 0, 0, 64, 4, dataset.flip))
    mean = torch.from_numpy(dataset.mean)[2:34, 2:34]
    values = torch.cat([ops.augment(*batch[:3], mean, 64.0) for batch in batches])
    assert abs(values.mean().item()) < 0.05
    assert 0.8 < values.std().item() < 1.2
