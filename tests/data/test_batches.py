import numpy as np
import pytest
import torch

from alexkern.data import (
    DataError,
    Split,
    evaluation_batches,
    iterate,
    load_dataset,
    to_input,
    training_batches,
)

SIZE, CROP, MARGIN, COUNT = 12, 8, 4, 60


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
    return list(
        iterate(training_batches(SPLIT, seed, number, batch_size, CROP, MARGIN, flip), **kwargs)
    )


def views(batches):
    """(sample, top, left, flipped) of every crop, after checking all of its pixels."""
    found = []
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        for image, label in zip(images.numpy().astype(int), labels.tolist(), strict=True):
            sample, top, left = image[0, 0, 0], image[0, 0, 1], image[0, :, 2].min()
            assert label == sample % 7
            flipped = image[0, 0, 2] > image[0, 1, 2]
            columns = left + np.arange(CROP)[:: -1 if flipped else 1]
            assert image.shape == (CROP, CROP, 3)
            assert (image[..., 0] == sample).all()
            assert (image[..., 1] == (top + np.arange(CROP))[:, None]).all()
            assert (image[..., 2] == columns).all()
            found.append((int(sample), int(top), int(left), bool(flipped)))
    return found


def test_an_epoch_uses_whole_batches_of_distinct_samples():
    batches = epoch()
    assert [len(labels) for _, labels in batches] == [16] * 3
    assert len({sample for sample, *_ in views(batches)}) == 48


def test_a_small_split_gives_one_batch():
    assert [len(labels) for _, labels in epoch(batch_size=100)] == [COUNT]


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
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_at_any_batch(workers):
    assert views(epoch(workers=workers, first=2)) == views(epoch())[32:]


def test_evaluation_takes_each_central_crop_once():
    batches = list(iterate(evaluation_batches(SPLIT, 16, CROP, MARGIN)))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 12]
    assert views(batches) == [(sample, 2, 2, False) for sample in range(COUNT)]


class Broken(Coordinates):
    def __getitem__(self, indices):
        raise DataError("cannot decode x.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_with_its_one_line(workers):
    batches = evaluation_batches(Split(Broken(), SPLIT.labels), 16, CROP, MARGIN)
    with pytest.raises(DataError) as error:
        list(iterate(batches, workers))
    assert str(error.value) == "cannot decode x.png"


def test_to_input_subtracts_the_central_mean_and_scales():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, CROP, CROP, 3), np.uint8)
    mean = random.uniform(0, 255, (SIZE, SIZE, 3)).astype(np.float32)
    result = to_input(torch.from_numpy(images), torch.from_numpy(mean), 64.0)
    expected = ((images - mean[2:10, 2:10].astype(np.float64)) / 64).transpose(0, 3, 1, 2)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_digits_reach_the_network_at_unit_scale():
    dataset = load_dataset("digits", 36)
    batches = training_batches(dataset.train, 0, 0, 64, 32, 4, dataset.flip)
    mean = torch.from_numpy(dataset.mean)
    values = torch.cat([to_input(images, mean, 64.0) for images, _ in iterate(batches)])
    assert abs(values.mean().item()) < 0.05
    assert 0.8 < values.std().item() < 1.2
