import io
import os
import tarfile

import numpy as np
import pytest
from pictures import archive, class_folders, contents

from alexkern.data import DataError
from alexkern.data.decode import ImageError
from alexkern.data.sources import list_source

CLASSES = ("n01", "n02")


@pytest.fixture
def folders(tmp_path):
    return class_folders(tmp_path / "folders", classes=CLASSES)


def listed(source):
    """For each split what is in the files, with their labels."""
    return {
        name: [
            (item.read(source.root), label)
            for item, label in zip(listing.items, listing.labels.tolist(), strict=True)
        ]
        for name, listing in source.splits.items()
    }


def val_images(folders):
    return {name.split("/")[-1]: data for name, data in contents(folders, "val/*/*").items()}


def truth(folders):
    return {path.name: path.parent.name for path in sorted(folders.glob("val/*/*"))}


def flat(folders, root):
    """The same images as ILSVRC has them: train in archives, val without classes."""
    root.mkdir()
    inner = {
        f"{name}.tar": archive(
            {
                path.name: path.read_bytes()
                for path in sorted((folders / "train" / name).iterdir())[::-1]
            }
        )
        for name in reversed(CLASSES)
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(archive(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(archive(val_images(folders)))
    return root


def meta():
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    rows = [(2, "n01", "ant"), (1, "n02", "bee"), (3, "n99", "insect")]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, fields)[:, None]})
    return file.getvalue()


def ids(folders):
    return "".join({"n01": "2\n", "n02": "1\n"}[name] for _, name in sorted(truth(folders).items()))


def devkit(folders, root, packed):
    files = {
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": ids(folders).encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": meta(),
        "ILSVRC2012_devkit_t12/readme.txt": b"",
    }
    if packed:
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for name, data in files.items() if not packed else ():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def write_truth(kind, folders, root):
    pairs = sorted(truth(folders).items(), reverse=True)
    if kind.startswith("devkit"):
        devkit(folders, root, packed="packed" in kind)
    elif kind == "ids":
        (root / "ILSVRC2012_validation_ground_truth.txt").write_text(ids(folders))
        (root / "meta.mat").write_bytes(meta())
    elif kind == "csv":
        lines = [f"{name.split('.')[0]},{label} 1 2 3 4 {label} 5 6 7 8" for name, label in pairs]
        text = "\ufeffImageId,PredictionString\r\n" + "\r\n".join(lines)
        (root / "LOC_val_solution.csv").write_text(text, encoding="utf-8")
    else:
        (root / "val.txt").write_text("\n".join(f"{name} {label}" for name, label in pairs))


def test_class_folders(folders):
    source = list_source(folders)
    assert source.class_names == CLASSES
    for split in ("train", "val"):
        expected = contents(folders, f"{split}/*/*")  # sorted, and so by class
        assert [item.name for item in source.splits[split].items] == list(expected)
        found = listed(source)[split]
        assert [data for data, _ in found] == list(expected.values())
        assert [CLASSES[label] for _, label in found] == [name.split("/")[1] for name in expected]


@pytest.mark.parametrize("kind", ["devkit", "devkit packed", "ids", "csv", "txt"])
def test_archives_hold_the_images_of_the_folders(kind, folders, tmp_path):
    root = flat(folders, tmp_path / "flat")
    write_truth(kind, folders, root)
    source = list_source(root)
    assert source.class_names == CLASSES
    assert listed(source) == listed(list_source(folders))
    name = source.splits["train"].items[0].name
    assert name == "ILSVRC2012_img_train.tar/n01.tar/train_n01_0.JPEG"


def test_flat_folder_ground_truth_elsewhere_and_other_years(folders, tmp_path):
    root = flat(folders, tmp_path / "flat")
    (root / "ILSVRC2012_img_train.tar").rename(root / "ILSVRC2010_images_train.tar")
    (root / "ILSVRC2012_img_val.tar").unlink()
    (root / "val").mkdir()
    for name, data in val_images(folders).items():
        (root / "val" / name).write_bytes(data)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_truth("csv", folders, elsewhere)
    source = list_source(root, elsewhere / "LOC_val_solution.csv")
    assert listed(source) == listed(list_source(folders))


def test_what_is_no_image_by_its_name_is_told(folders):
    (folders / "train" / "n01" / "notes.txt").write_text("")
    (folders / "train" / "n01" / "more").mkdir()
    (folders / "train" / "stray.jpg").write_text("")
    (folders / "val" / ".hidden").mkdir()
    source = list_source(folders)
    assert source.left_out == [
        *("train/stray.jpg", "train/n01/more", "train/n01/notes.txt", "val/.hidden")
    ]
    assert len(source.splits["train"].items) == 10


def test_in_archives_too(folders, tmp_path):
    root = flat(folders, tmp_path / "flat")
    write_truth("txt", folders, root)
    before = list_source(root)
    inner = archive({"a.jpg": b"a", "._a.txt": b""})
    outer = archive({"readme": b"", "n01.tar": inner, "n02.tar": inner})
    (root / "ILSVRC2012_img_train.tar").write_bytes(outer)
    source = list_source(root)
    assert [name.split("/", 1)[1] for name in source.left_out] == [
        *("readme", "n01.tar/._a.txt", "n02.tar/._a.txt")
    ]
    assert source.digest() != before.digest()


def test_odd_names(folders):
    names = ["猫 é.jpg", "a\nb.jpg", os.fsdecode(b"\xff\xfe.jpg"), " .jpg", "UPPER.JPG"]
    for name in names:
        (folders / "train" / "n01" / name).write_bytes(os.fsencode(name))
    source = list_source(folders)
    found = [(data, label) for data, label in listed(source)["train"] if data[:2] != b"\xff\xd8"]
    assert found == [(os.fsencode(name), 0) for name in sorted(names)]
    assert source.digest() == list_source(folders).digest()


def test_the_digest_follows_names_sizes_and_labels(folders):
    file = folders / "train" / "n01" / "train_n01_0.JPEG"
    digests = [list_source(folders).digest()]
    file.write_bytes(b"longer" + file.read_bytes())
    digests.append(list_source(folders).digest())
    file.rename(file.with_name("other.JPEG"))
    digests.append(list_source(folders).digest())
    for split in ("train", "val"):
        (folders / split / "n02").rename(folders / split / "n00")
    digests.append(list_source(folders).digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize("how", ["grown", "shrunk", "gone"])
def test_a_file_that_changes_while_it_is_prepared_stops_the_work(folders, how):
    item = list_source(folders).splits["train"].items[0]
    path = folders / item.name
    content = path.read_bytes()
    path.write_bytes(content + b"x" if how == "grown" else content[:-1])
    if how == "gone":
        path.unlink()
    with pytest.raises(DataError, match=r"cannot read|has changed"):
        item.read(folders)


def test_links_and_what_is_no_file(folders):
    folder = folders / "train" / "n01"
    (folder / "a.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "b.jpg")
    (folder / "c.jpg").symlink_to(folder / "train_n01_0.JPEG")
    first, second, third = list_source(folders).splits["train"].items[:3]
    for item in (first, second):
        with pytest.raises(ImageError, match="no file"):
            item.read(folders)
    assert third.read(folders) == (folder / "train_n01_0.JPEG").read_bytes()


def complaint(root, ground_truth=None):
    with pytest.raises(DataError) as error:
        list_source(root, ground_truth)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no line", ["has no line for val_n01_1.JPEG", "1 in all"]),
        ("twice", ["line 4", "second time"]),
        ("stranger", ["line 4", "'who'", "no validation image"]),
        ("unknown class", ["val_n01_0.JPEG", "'n77'", "training set lacks"]),
        ("no class", ["val_n01_0.JPEG", "''"]),
        ("class without images", ["val lacks n01"]),
        ("empty", ["0 lines for 4"]),
        ("missing", ["cannot read", "gone.txt"]),
    ],
)
def test_pairs_that_do_not_fit(how, words, folders, tmp_path):
    root = flat(folders, tmp_path / "flat")
    write_truth("txt", folders, root)
    path = root / "val.txt"
    if how == "no line":
        change(path, "val_n01_1.JPEG n01\n", "")
    elif how == "twice":
        change(path, "val_n01_0", "val_n02_0")
    elif how == "stranger":
        change(path, "val_n01_0.JPEG", "who")
    elif how == "unknown class":
        change(path, "val_n01_0.JPEG n01", "val_n01_0.JPEG n77")
    elif how == "no class":
        change(path, "val_n01_0.JPEG n01", "val_n01_0.JPEG")
    elif how == "class without images":
        path.write_text(path.read_text().replace(" n01", " n02"))
    elif how == "empty":
        path.write_text("")
        (root / "meta.mat").write_bytes(meta())
    message = complaint(root, root / "gone.txt" if how == "missing" else None)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("too few", ["3 lines for 4 validation images"]),
        ("unknown id", ["line 2", "77"]),
        ("class outside", ["'n99'", "training set lacks"]),
        ("no meta", ["no meta.mat"]),
        ("broken meta", ["meta.mat", "fetch it again"]),
        ("another meta", ["meta.mat", "fetch it again"]),
    ],
)
def test_ids_that_do_not_fit(how, words, folders, tmp_path):
    root = flat(folders, tmp_path / "flat")
    write_truth("ids", folders, root)
    path, table = root / "ILSVRC2012_validation_ground_truth.txt", root / "meta.mat"
    if how == "too few":
        change(path, "2\n", "")
    elif how == "unknown id":
        path.write_text("2\n77\n1\n1\n")
    elif how == "class outside":
        path.write_text("3\n2\n1\n1\n")
    elif how == "no meta":
        table.unlink()
    elif how == "broken meta":
        table.write_bytes(table.read_bytes()[:300])
    elif how == "another meta":
        from scipy.io import savemat

        savemat(table, {"other": 1})
    for word in words:
        assert word in complaint(root)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no source", ["no folder", "gone"]),
        ("no train", ["neither train/ nor ILSVRC2012_img_train.tar"]),
        ("both", ["train.tar and train", "move one away"]),
        ("no truth", ["no ground truth", "--ground-truth", "class folders"]),
        ("truth for nothing", ["has class folders", "leave --ground-truth out"]),
        ("empty class", ["train/n01", "has no images"]),
        ("empty archive", ["n01.tar has no images"]),
        ("no archives", ["holds no archives"]),
        ("image twice", ["n01.tar holds a.jpg more than once"]),
        ("class twice", ["holds n01.tar more than once"]),
        ("not a devkit", ["it is not the devkit"]),
        ("empty val", ["val has no images"]),
    ],
)
def test_sources_that_will_not_do(how, words, folders, tmp_path):
    root, ground_truth = flat(folders, tmp_path / "flat"), None
    write_truth("txt", folders, root)
    train = root / "ILSVRC2012_img_train.tar"
    if how == "no source":
        root = root / "gone"
    elif how == "no train":
        train.unlink()
    elif how == "both":
        (root / "train").mkdir()
    elif how == "no truth":
        (root / "val.txt").unlink()
    elif how == "truth for nothing":
        root, ground_truth = folders, root / "val.txt"
    elif how == "empty class":
        root = folders
        for file in (root / "train" / "n01").iterdir():
            file.unlink()
    elif how == "empty archive":
        train.write_bytes(archive({"n01.tar": archive({"a.txt": b""})}))
    elif how == "no archives":
        train.write_bytes(archive({"a.jpg": b""}))
    elif how == "image twice":
        train.write_bytes(archive({"n01.tar": archive({"x/a.jpg": b"", "y/a.jpg": b""})}))
    elif how == "class twice":
        inner = archive({"a.jpg": b""})
        train.write_bytes(archive({"n01.tar": inner, "again/n01.tar": inner}))
    elif how == "not a devkit":
        (root / "devkit").mkdir()
    elif how == "empty val":
        (root / "ILSVRC2012_img_val.tar").unlink()
        (root / "val").mkdir()
    message = complaint(root, ground_truth)
    for word in words:
        assert word in message


def test_damaged_archives_are_refused_wherever_they_end(folders, tmp_path):
    root = flat(folders, tmp_path / "flat")
    write_truth("txt", folders, root)
    train = root / "ILSVRC2012_img_train.tar"
    content = train.read_bytes()
    whole = list_source(root).digest()
    with tarfile.open(train) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size + 512  # of the mark that ends it; the rest is filling
    for length in (*range(0, end, 512 * 3), *range(700, end, 512 * 7), end - 1):
        train.write_bytes(content[:length])
        assert "fetch it again" in complaint(root)
    train.write_bytes(content[:end])
    assert list_source(root).digest() == whole


def test_a_class_whose_archive_does_not_end_is_refused(folders, tmp_path):
    """Reading on would lead into the next one."""
    root = flat(folders, tmp_path / "flat")
    write_truth("txt", folders, root)
    inner = archive({"a.jpg": b"a"})
    files = {"n01.tar": inner[:1024], "n02.tar": inner}
    (root / "ILSVRC2012_img_train.tar").write_bytes(archive(files))
    assert "n01.tar is cut off or damaged" in complaint(root)


@pytest.mark.parametrize("where", ["outer header", "inner header", "inner mark"])
def test_archives_with_broken_headers_are_refused(where, folders, tmp_path):
    root = flat(folders, tmp_path / "flat")
    write_truth("txt", folders, root)
    train = root / "ILSVRC2012_img_train.tar"
    content = bytearray(train.read_bytes())
    with tarfile.open(train) as tar:
        first, second = tar.getmembers()
    inner = content[first.offset_data :][: first.size].rstrip(b"\0")
    at = {
        "outer header": second.offset + 150,  # the checksum
        "inner header": first.offset_data + 150,
        "inner mark": first.offset_data + -(-len(inner) // 512) * 512 + 100,
    }[where]
    content[at] ^= 1
    train.write_bytes(content)
    assert "fetch it again" in complaint(root)
