import pickle

import numpy as np
import pytest
import torch
from pictures import class_folders, contents

from alexkern.data import DataError, load_dataset
from alexkern.data import prepare as preparation
from alexkern.data import store as stores
from alexkern.data.decode import decode
from alexkern.data.prepare import prepare
from alexkern.data.store import StoreImages, check_store, open_store, read_manifest, sealed

SIZE = 16


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A source, its store, and the store's files."""
    root = tmp_path_factory.mktemp("original")
    source = class_folders(root / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "PART_IMAGES", 4)
        prepare(source, root / "store", SIZE)
    return source, contents(root / "store")


@pytest.fixture
def store(original, tmp_path):
    """A copy, to be damaged."""
    for name, content in original[1].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def complaint(store, size=SIZE):
    with pytest.raises(DataError) as error:
        load_dataset(str(store), size)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_store_is_a_data_set_as_its_source_is(original, store):
    source, _ = original
    ours, theirs = (load_dataset(str(path), SIZE) for path in (store, source))
    assert ours.class_names == theirs.class_names
    assert ours.flip
    np.testing.assert_allclose(ours.mean, theirs.mean)  # so few images are all taken for it
    np.testing.assert_allclose(ours.colours.deviations, theirs.colours.deviations, rtol=1e-6)
    assert (ours.train.labels == theirs.train.labels).all()
    assert (ours.val.labels == theirs.val.labels).all()


def test_images_reach_forked_loaders(original, store):
    train = open_store(store, SIZE).train
    loader = torch.utils.data.DataLoader(
        train.images,
        batch_size=None,
        sampler=range(len(train.images)),
        num_workers=2,
        collate_fn=lambda image: torch.from_numpy(image.copy()),
    )
    files = sorted(original[0].glob("train/*/*"))
    for image, file in zip(loader, files, strict=True):
        assert (image.numpy() == decode(file, SIZE)).all()


def numbered(folder, counts):
    """Parts in which each image holds its number."""
    paths, number = [], 0
    for part, count in enumerate(counts):
        images = np.arange(number, number + count, dtype=np.uint8)[:, None, None, None]
        paths.append(folder / f"{part}.npy")
        np.save(paths[-1], images.repeat(SIZE, 1).repeat(SIZE, 2).repeat(3, 3))
        number += count
    return StoreImages(paths, counts, SIZE)


@pytest.mark.parametrize("mapped", [1, 2, 100])
def test_images_are_found_in_their_parts(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(stores, "MAPPED_PARTS", mapped)
    images = numbered(tmp_path, [0, 3, 1, 0, 0, 5, 0])
    assert len(images) == 9
    for sequence in (images, pickle.loads(pickle.dumps(images))):
        for index in np.random.default_rng(0).permutation(9).tolist() * 2:
            image = sequence[index]
            assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
            assert (image == index).all()
        assert [image[0, 0, 0] for image in sequence] == list(range(9))  # ends by itself
    for index in (-1, 9):
        with pytest.raises(IndexError):
            images[index]


def test_images_are_views_that_nobody_can_write_to(tmp_path):
    image = numbered(tmp_path, [2])[1]
    assert image.base is not None
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0


def test_a_part_that_goes_away_is_one_line(tmp_path):
    images = numbered(tmp_path, [2, 2])
    (tmp_path / "1.npy").unlink()
    assert (images[1] == 1).all()
    with pytest.raises(DataError, match=r"cannot read .*1\.npy \(No such file"):
        images[2]


def test_every_flipped_bit_is_found_and_named(store):
    random = np.random.default_rng(0)
    for path in sorted(store.iterdir()):
        content = path.read_bytes()
        for at in random.integers(0, len(content), 12):
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            if path.name == "manifest.json":
                with pytest.raises(DataError, match=r"manifest\.json"):
                    check_store(store)
            else:
                (problem,) = check_store(store)
                assert problem.startswith(f"{path.name} is damaged")
        path.write_bytes(content)
    assert check_store(store) == []


def test_no_bit_of_the_manifest_may_flip(store):
    path = store / "manifest.json"
    content = path.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"manifest\.json"):
            read_manifest(store)


@pytest.mark.parametrize("how", ["gone", "shorter", "longer"])
@pytest.mark.parametrize("name", ["train-00001.npy", "val-labels.npy", "mean.npy"])
def test_files_of_other_sizes_are_found_without_reading_them(store, how, name):
    path = store / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] if how == "shorter" else content + b"x")
    if how == "gone":
        path.unlink()
    assert name in complaint(store)
    (problem,) = check_store(store)
    assert problem.startswith(name)


def test_another_size_than_is_wanted(store):
    message = complaint(store, 36)
    assert "holds images of 16 pixels, and 36 are wanted" in message
    assert "--size 36" in message


def rewrite(store, **changes):
    manifest = {**read_manifest(store), **changes}
    (store / "manifest.json").write_bytes(sealed(manifest))
    return manifest


def test_a_newer_format_is_refused(store):
    rewrite(store, version=2)
    assert "has format 2, and this alexkern knows 1" in complaint(store)


def test_an_unfinished_store_is_no_data_set(store):
    (store / "manifest.json").unlink()
    (store / "unfinished").mkdir()
    assert "unfinished store" in complaint(store)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version": 1}', b"\xff", b"[" * 10**5])
def test_what_is_no_manifest(store, content):
    (store / "manifest.json").write_bytes(content)
    assert "damaged, or no manifest" in complaint(store)


def test_labels_beyond_the_classes(store):
    rewrite(store, class_names=["ant"])
    assert "labels beyond 1 classes" in complaint(store)
    problems = check_store(store)
    assert [problem.split(":")[0] for problem in problems] == ["train-labels.npy", "val-labels.npy"]


def test_a_manifest_that_contradicts_itself(store):
    splits = read_manifest(store)["splits"]
    splits["train"]["images"] += 1
    splits["val"]["parts"][0]["images"] -= 1
    rewrite(store, splits=splits)
    problems = "\n".join(check_store(store))
    for words in (
        "parts do not add up to 11",
        "parts do not add up to 4",
        "val-00000.npy is uint8 (4, 16, 16, 3)",
        "train-labels.npy is int64 (10,)",
    ):
        assert words in problems


def test_a_header_that_numpy_cannot_read_is_one_line(store):
    path = store / "mean.npy"
    content = bytearray(path.read_bytes())
    content[12] ^= 64
    path.write_bytes(content)
    assert "cannot read" in complaint(store)
    assert "mean.npy" in complaint(store)


def test_open_store_needs_a_store(tmp_path):
    with pytest.raises(DataError, match="is no store"):
        open_store(tmp_path, SIZE)
