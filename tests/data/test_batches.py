import multiprocessing

import numpy as np
import pytest
import torch

from alexkern import ops
from alexkern.data import (
    Augmentation,
    DataError,
    Split,
    evaluation_batches,
    iterate,
    load_dataset,
    on_device,
    training_batches,
)
from alexkern.parallel import Axis, Mesh

SIZE, CROP, COUNT = 12, 8, 60
OFFSETS = SIZE - CROP + 1


class Coordinates:
    """Each pixel holds its image's number, its row and its column."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = np.empty((SIZE, SIZE, 3), np.uint8)
        image[..., 0] = index
        image[..., 1] = np.arange(SIZE)[:, None]
        image[..., 2] = np.arange(SIZE)
        return image


SPLIT = Split(Coordinates(), np.arange(COUNT) % 7)


def epoch(seed=0, number=0, batch_size=16, workers=0, first=0, offsets=OFFSETS, **given):
    augmentation = Augmentation(CROP, offsets, **{"flip": True, **given})
    batches = training_batches(SPLIT, seed, number, batch_size, augmentation)
    return list(iterate(batches, workers, first=first))


def views(batches):
    """(sample, top, left, flipped) of every crop, after checking that it is the sample's."""
    found = []
    for batch in batches:
        images = batch.images.numpy()
        dtypes = [torch.uint8, torch.bool, torch.float32, torch.int64]
        assert [tensor.dtype for tensor in batch] == dtypes
        for crop, flip, label in zip(images, batch.flips.tolist(), batch.labels, strict=True):
            sample, top, left = map(int, crop[0, 0])
            size = len(crop)
            expected = Coordinates()[sample][top : top + size, left : left + size]
            np.testing.assert_array_equal(crop, expected)
            assert label == sample % 7
            found.append((sample, top, left, flip))
    return found


def test_an_epoch_uses_whole_batches_of_distinct_samples():
    batches = epoch()
    assert [tuple(batch.images.shape) for batch in batches] == [(16, CROP, CROP, 3)] * 3
    assert len({sample for sample, *_ in views(batches)}) == 48


def test_a_small_split_gives_one_batch():
    assert [len(batch.labels) for batch in epoch(batch_size=100)] == [COUNT]


@pytest.mark.parametrize("offsets", [OFFSETS, OFFSETS - 1])
def test_every_corner_and_reflection_occurs_alike(offsets):
    found = [view[1:] for number in range(60) for view in views(epoch(0, number, offsets=offsets))]
    kinds, counts = np.unique(np.array(found, int), axis=0, return_counts=True)
    assert len(kinds) == offsets**2 * 2
    assert kinds[:, :2].max() == offsets - 1
    # 2880 draws of n kinds: a binomial distribution
    mean = 2880 / len(kinds)
    assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)


def test_digits_are_not_mirrored():
    assert not any(flipped for *_, flipped in views(epoch(flip=False)))


def test_a_chunk_shares_its_view():
    """As in the 2012 code, where the chunk was of 32 images."""
    found = [view[1:] for view in views(epoch(chunk=5))]
    assert len(found) == 48
    chunks = [found[first : first + 5] for first in range(0, 48, 5)]
    assert all(len(set(chunk)) == 1 for chunk in chunks)
    assert len({chunk[0] for chunk in chunks}) > 5


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


def test_no_noise_changes_no_colour_and_no_view():
    noise = np.diag([5.0, 0.0, 0.0])
    plain, noisy = epoch(), epoch(colour_noise=noise)
    assert not torch.cat([batch.shift for batch in plain]).any()
    assert views(plain) == views(noisy)


def test_colour_noise_is_normal_with_the_covariance_that_it_is_given():
    """Each image of each epoch has its own: 60 images, 200 epochs."""
    noise = np.random.default_rng(0).standard_normal((3, 3))
    augmentation = Augmentation(CROP, OFFSETS, True, colour_noise=noise)
    shifts = np.concatenate(
        [training_batches(SPLIT, 0, number, 60, augmentation).shift for number in range(200)]
    )
    assert shifts.dtype == np.float32
    assert len(np.unique(shifts[:, 0])) == 12_000
    covariance = noise.T @ noise
    # deviations of an estimate from n normal numbers: sqrt((s_ii s_jj + s_ij^2) / n)
    variances = np.diag(covariance)
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / 12_000)
    assert (np.abs(np.cov(shifts.T) - covariance) < 5 * spread).all()
    assert (np.abs(shifts.mean(0)) < 5 * np.sqrt(variances / 12_000)).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    for ours, theirs in zip(
        epoch(workers=workers, colour_noise=np.eye(3)), epoch(colour_noise=np.eye(3)), strict=True
    ):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_at_any_batch(workers):
    assert views(epoch(workers=workers, first=2)) == views(epoch())[32:]


def test_evaluation_takes_each_whole_image_once():
    batches = list(iterate(evaluation_batches(SPLIT, SIZE, 16)))
    assert [tuple(batch.images.shape) for batch in batches] == [
        *[(16, SIZE, SIZE, 3)] * 3,
        (12, SIZE, SIZE, 3),
    ]
    assert views(batches) == [(sample, 0, 0, False) for sample in range(COUNT)]


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_evaluate_shares(replicas):
    seen = []
    for index in range(replicas):
        mesh = Mesh(Axis(index, replicas))
        batches = list(iterate(evaluation_batches(SPLIT, SIZE, 16, mesh)))
        assert [len(batch.labels) for batch in batches[:-1]] == [16] * (len(batches) - 1)
        seen += [view[0] for view in views(batches)]
    assert seen == list(range(COUNT))


@pytest.mark.parametrize("hybrid", [False, True])
def test_processes_share_a_batch(hybrid):
    """Replicas its rows, in a hybrid columns the images of those rows, unequally as it may be."""
    augmentation = Augmentation(SIZE, 1, True, colour_noise=np.eye(3))
    (whole, *_), shares = iterate(training_batches(SPLIT, 0, 0, 11, augmentation)), []
    for replica in range(2):
        of_replica = []
        for column in range(2):
            mesh = Mesh(Axis(replica, 2), Axis(column, 2), hybrid)
            batches = training_batches(SPLIT, 0, 0, 11, augmentation, mesh)
            assert len(batches) == COUNT // 11
            of_replica.append(next(iterate(batches)))
        assert torch.equal(of_replica[0].labels, of_replica[1].labels)
        shares += of_replica if hybrid else of_replica[:1]
    for name in ("images", "flips", "shift"):
        assert torch.equal(
            torch.cat([getattr(each, name) for each in shares]), getattr(whole, name)
        )
    labels = torch.cat([each.labels for each in (shares[::2] if hybrid else shares)])
    assert torch.equal(labels, whole.labels)


class Broken(Coordinates):
    def __getitem__(self, index):
        raise DataError("cannot decode x.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_with_its_one_line(workers):
    batches = evaluation_batches(Split(Broken(), SPLIT.labels), SIZE, 16)
    with pytest.raises(DataError) as error:
        list(iterate(batches, workers))
    assert str(error.value) == "cannot decode x.png"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_reach_the_device_in_order(device, workers):
    batches = evaluation_batches(SPLIT, SIZE, 16)
    with on_device(batches, workers, device, first=1) as made:
        sent = list(made)
    for ours, theirs in zip(sent, list(iterate(batches))[1:], strict=True):
        assert ours.images.device.type == device.type
        assert all(torch.equal(one.cpu(), other) for one, other in zip(ours, theirs, strict=True))


def test_workers_end_with_the_context_however_it_is_left():
    def use():
        with on_device(evaluation_batches(SPLIT, SIZE, 4), 2, torch.device("cpu")) as made:
            next(made)
            assert len(multiprocessing.active_children()) == 2
            raise InterruptedError

    with pytest.raises(InterruptedError) as kept:
        use()
    assert not multiprocessing.active_children()
    assert kept.tb  # which has the generators


def test_digits_reach_the_network_at_unit_scale():
    dataset = load_dataset("digits", 36)
    augmentation = Augmentation(32, 5, dataset.flip)
    batches = iterate(training_batches(dataset.train, 0, 0, 64, augmentation))
    mean = torch.from_numpy(dataset.mean)[2:34, 2:34]
    corners = torch.zeros(64, 2, dtype=torch.int64)
    values = torch.cat(
        [ops.augment(batch.images, corners, batch.flips, mean, 64.0) for batch in batches]
    )
    assert abs(values.mean().item()) < 0.05
    assert 0.8 < values.std().item() < 1.2


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()]
)
def test_a_worker_that_dies_as_it_hands_out_a_batch(monkeypatch, error):
    """What is read from it then fails in another way than what torch makes of a dead worker."""

    class Broken:
        def __iter__(self):
            return self

        def __next__(self):
            raise error

        def _shutdown_workers(self):
            pass

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda _: Broken())
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly"):
        next(iterate(evaluation_batches(SPLIT, SIZE, 16), 1))
