import sys
import types

import numpy as np
import pytest
from PIL import Image

from alexkern.data import DataError, derive_seed, load_dataset


def stacked(images, indices):
    return np.stack([images[index] for index in indices])


def test_derived_seeds_are_fixed_distinct_and_fit_int64():
    assert derive_seed(0, "dropout", 3, 1) == derive_seed(0, "dropout", 3, 1)
    keys = [
        (),
        (0,),
        (0, 0),
        (1,),
        (0, 1),
        (1, 0),
        ("a",),
        ("a", 0),
        ("b",),
        (1 << 32,),
        (2**63 - 1,),
    ]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_do_not_change_between_versions():
    # A change here breaks the resumption of every run.
    assert derive_seed(0, "initialisation") == 4699439538701884592


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    source = load_digits()
    dataset = load_dataset("digits", 8)  # the size of the source: nothing is interpolated
    assert len(dataset.train.labels) == 1437
    assert len(dataset.val.labels) == 360
    assert dataset.class_names == tuple("0123456789")
    assert not dataset.flip

    def content(image, label):
        return (np.rint(np.asarray(image) * 255 / 16).astype(np.uint8).tobytes(), int(label))

    expected = sorted(map(content, source.images, source.target))
    found = []
    for split in (dataset.train, dataset.val):
        images = stacked(split.images, np.arange(len(split.labels)))
        assert images.dtype == np.uint8
        assert images.shape == (len(split.labels), 8, 8, 3)
        assert (images[..., 0] == images[..., 1]).all()
        assert (images[..., 0] == images[..., 2]).all()
        grey = [image.tobytes() for image in np.ascontiguousarray(images[..., 0])]
        found += list(zip(grey, map(int, split.labels), strict=True))
    assert sorted(found) == expected


def test_digits_are_split_alike_every_time_and_hold_every_class():
    first, second = load_dataset("digits", 36, seed=0), load_dataset("digits", 36, seed=9)
    assert (first.val.labels == second.val.labels).all()
    assert (np.bincount(first.val.labels, minlength=10) > 20).all()


def test_enlarging_keeps_the_image():
    small, large = load_dataset("digits", 8), load_dataset("digits", 36)
    indices = np.arange(5)
    for before, after in zip(
        stacked(small.train.images, indices), stacked(large.train.images, indices), strict=True
    ):
        theirs = np.asarray(Image.fromarray(before).resize((36, 36), Image.Resampling.BILINEAR))
        assert np.abs(theirs.astype(int) - after).max() <= 1


def test_mean_image_is_the_mean_of_the_training_images():
    dataset = load_dataset("digits", 36)
    images = stacked(dataset.train.images, np.arange(1437))
    assert dataset.mean.dtype == np.float32
    np.testing.assert_allclose(dataset.mean, images.mean(0, dtype=np.float64), rtol=1e-6)


def test_synthetic_images_depend_on_seed_and_index_alone():
    first, again, other = (load_dataset("synthetic", 36, seed) for seed in (1, 1, 2))
    many = stacked(first.train.images, np.arange(6))
    assert many.shape == (6, 36, 36, 3)
    assert (many[[4, 2]] == stacked(again.train.images, np.array([4, 2]))).all()
    assert (many != stacked(other.train.images, np.arange(6))).mean() > 0.9
    assert (many != stacked(first.val.images, np.arange(6))).mean() > 0.9
    assert len({image.tobytes() for image in many}) == 6


def test_synthetic_classes_can_be_told_apart():
    dataset = load_dataset("synthetic", 36)
    train, val = (
        stacked(split.images, np.arange(100)).astype(int) for split in (dataset.train, dataset.val)
    )
    nearest = np.abs(val[:, None] - train[None]).sum((2, 3, 4)).argmin(1)
    assert (dataset.train.labels[nearest] == dataset.val.labels[:100]).all()


def test_large_synthetic_images_have_the_classes_of_imagenet():
    dataset = load_dataset("synthetic", 256)
    assert len(dataset.class_names) == 1000
    assert set(dataset.train.labels) == set(range(1000))
    assert stacked(dataset.train.images, np.array([7])).shape == (1, 256, 256, 3)


@pytest.fixture
def folder(tmp_path):
    """Two classes; green squares in the middle of red, wide or tall images."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index, (width, height) in enumerate([(60, 40), (40, 80)]):
                image = np.zeros((height, width, 3), np.uint8)
                image[..., 0] = 255
                top, left = (height - 40) // 2, (width - 40) // 2
                image[top : top + 40, left : left + 40] = (0, 200, 0)
                Image.fromarray(image).save(tmp_path / split / name / f"{index}.PNG")
    return tmp_path


def test_folder_gives_central_squares_of_the_shorter_side(folder):
    dataset = load_dataset(str(folder), 36)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.flip
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    images = stacked(dataset.train.images, np.arange(4))
    assert images.shape == (4, 36, 36, 3)
    # Resampling mixes a little red into the outermost pixels.
    assert (images[:, 1:-1, 1:-1] == np.array([0, 200, 0], np.uint8)).all()
    assert (images[..., 1] > 180).all()
    np.testing.assert_allclose(dataset.mean, images.mean(0), rtol=1e-6)


def test_folder_equals_scaling_first_and_cropping_then(folder):
    random = np.random.default_rng(0)
    smooth = random.integers(0, 255, (5, 7, 3), np.uint8)
    image = Image.fromarray(smooth).resize((140, 100), Image.Resampling.BICUBIC)
    path = folder / "train" / "cat" / "0.PNG"
    image.save(path)
    scaled = image.resize((70, 50), Image.Resampling.BILINEAR).crop((10, 0, 60, 50))
    stored = stacked(load_dataset(str(folder), 50).train.images, np.array([0]))[0]
    assert np.abs(np.asarray(scaled).astype(int) - stored).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_folder_takes_every_mode(folder, mode):
    image = Image.new("RGB", (40, 40), (255, 255, 255))
    converted = Image.new("I;16", (40, 40)) if mode == "I;16" else image.convert(mode)
    converted.save(folder / "train" / "cat" / "new.tiff")
    dataset = load_dataset(str(folder), 36)
    assert stacked(dataset.train.images, np.array([2])).shape == (1, 36, 36, 3)


def test_folder_ignores_other_files_and_hidden_folders(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    (folder / "train" / ".cache").mkdir()
    (folder / "val" / "labels.csv").write_text("")
    assert len(load_dataset(str(folder), 36).train.labels) == 4


def test_folder_takes_names_in_any_script(folder):
    (folder / "train" / "cat" / "0.PNG").rename(folder / "train" / "cat" / "猫 é.PNG")
    assert stacked(load_dataset(str(folder), 36).train.images, np.arange(2)).shape[0] == 2


def remove(path):
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    path.rmdir()


def break_folder(folder, how):
    if how == "no train":
        remove(folder / "train")
    elif how == "no val":
        remove(folder / "val")
    elif how == "empty class":
        (folder / "train" / "cow").mkdir()
        (folder / "val" / "cow").mkdir()
    elif how == "class without val":
        remove(folder / "val" / "dog")
    elif how == "class without train":
        (folder / "val" / "emu").mkdir()
    elif how == "no classes":
        remove(folder / "val" / "cat")
        remove(folder / "val" / "dog")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no train", ["train", "no folder", "one folder per class"]),
        ("no val", ["val", "no folder", "one folder per class"]),
        ("empty class", ["train/cow", "has no images"]),
        ("class without val", ["val lacks dog"]),
        ("class without train", ["train lacks emu"]),
        ("no classes", ["no class folders", "val"]),
    ],
)
def test_folder_errors_are_one_line_that_names_the_fix(folder, how, words):
    break_folder(folder, how)
    with pytest.raises(DataError) as error:
        load_dataset(str(folder), 36)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_unknown_name_says_what_there_is():
    with pytest.raises(DataError, match=r"no folder 'digit'.*digits, cifar10, synthetic"):
        load_dataset("digit", 36)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "truncated"])
def test_undecodable_image_is_named(folder, content):
    path = folder / "train" / "dog" / "1.PNG"
    path.write_bytes(path.read_bytes()[:90] if content == "truncated" else content)
    with pytest.raises(DataError, match=r"cannot decode .*train/dog/1\.PNG") as error:
        load_dataset(str(folder), 36)
    assert "\n" not in str(error.value)


def fake_torchvision(monkeypatch, cifar10):
    module = types.ModuleType("torchvision.datasets")
    module.CIFAR10 = cifar10
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def test_cifar10_comes_from_torchvision(monkeypatch, tmp_path):
    class Fake:
        classes = ("plane", "frog")

        def __init__(self, root, train, download):
            assert (root, download) == (str(tmp_path), True)
            self.data = np.full((6 if train else 2, 32, 32, 3), 10 if train else 20, np.uint8)
            self.targets = [0, 1] * (3 if train else 1)

    monkeypatch.setenv("ALEXKERN_DATA", str(tmp_path))
    fake_torchvision(monkeypatch, Fake)
    dataset = load_dataset("cifar10", 36)
    assert dataset.class_names == ("plane", "frog")
    assert dataset.flip
    assert dataset.train.labels.tolist() == [0, 1] * 3
    assert (stacked(dataset.train.images, np.arange(6)) == 10).all()
    assert stacked(dataset.val.images, np.arange(2)).shape == (2, 36, 36, 3)
    assert (dataset.mean == 10).all()


def test_cifar10_download_failure_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route\nto host")

    fake_torchvision(monkeypatch, fail)
    with pytest.raises(
        DataError, match=r"could not be downloaded.*no route to host.*ALEXKERN_DATA"
    ):
        load_dataset("cifar10", 36)


def test_cifar10_with_a_torchvision_that_does_not_fit_is_one_line(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", Broken("torchvision.datasets"))
    with pytest.raises(DataError, match=r"alexkern\[cifar\].*nms does not exist"):
        load_dataset("cifar10", 36)
