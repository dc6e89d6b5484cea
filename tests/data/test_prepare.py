import contextlib
import fcntl
import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import class_folders, contents, encoded, noise, png, smooth

from alexkern import cli
from alexkern.data import DataError
from alexkern.data import prepare as preparation
from alexkern.data.decode import decode
from alexkern.data.prepare import prepare
from alexkern.data.store import check_store, open_store, read_manifest

SIZE = 16


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(preparation, "PART_IMAGES", 4)


@pytest.fixture
def source(tmp_path):
    return class_folders(tmp_path / "source")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def images_of(split):
    return np.stack([split.images[index] for index in range(len(split.images))])


def complaint(*arguments, **options):
    with pytest.raises(DataError) as error:
        prepare(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_store_holds_the_images_of_its_source(source, store):
    prepare(source, store, SIZE)
    dataset = open_store(store, SIZE)
    assert dataset.class_names == ("ant", "bee")
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        files = sorted((source / name).glob("*/*"))
        assert (images_of(split) == np.stack([decode(file, SIZE) for file in files])).all()
        assert split.labels.dtype == np.int64
        assert [dataset.class_names[label] for label in split.labels] == [
            file.parent.name for file in files
        ]
    assert [path.name for path in sorted(store.iterdir())] == [
        *("manifest.json", "mean.npy", "train-00000.npy", "train-00001.npy", "train-00002.npy"),
        *("train-labels.npy", "val-00000.npy", "val-labels.npy"),
    ]
    assert check_store(store) == []


def test_mean_and_colours_are_those_of_all_training_pixels(source, store):
    prepare(source, store, SIZE)
    dataset, covariance = open_store(store, SIZE), np.array(read_manifest(store)["covariance"])
    images = images_of(dataset.train).astype(np.float64)
    assert dataset.mean.dtype == np.float32
    np.testing.assert_allclose(dataset.mean, images.mean(0), rtol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(images.reshape(-1, 3).T, bias=True), rtol=1e-10)
    vectors, deviations = dataset.colours.eigenvectors, dataset.colours.deviations
    assert vectors.dtype == deviations.dtype == np.float32
    assert deviations[0] >= deviations[1] >= deviations[2] > 0
    # What defines them: the data's spread along each, and none between two.
    along = images.reshape(-1, 3) @ vectors.astype(np.float64)
    np.testing.assert_allclose(np.cov(along.T, bias=True), np.diag(deviations) ** 2, atol=0.01)
    assert (vectors[np.abs(vectors).argmax(0), range(3)] > 0).all()


BAD = {
    "html.jpg": b"<html>404</html>",
    "empty.png": b"",
    "cut.jpg": encoded(smooth(50, 60), "JPEG")[:-300],
    "bomb.png": png(14_000, 14_000, 8, 2, b""),
    "float.tiff": encoded(np.ones((9, 9), np.float32), "TIFF"),
    "broken\nlink \udcff.jpg": None,
}


def test_what_cannot_be_used_is_named_and_the_rest_kept(source, store, capsys):
    for name, content in BAD.items():
        path = source / "train" / "bee" / name
        path.symlink_to("nowhere") if content is None else path.write_bytes(content)
    (source / "val" / "ant" / "notes.txt").write_text("")
    (source / "train" / "bee" / "cmyk.jpg").write_bytes(
        encoded(smooth(30, 30).convert("CMYK"), "JPEG")
    )
    prepare(source, store, SIZE)
    refused = read_manifest(store)["splits"]["train"]["refused"]
    assert {name.removeprefix("train/bee/") for name, _ in refused} == set(BAD)
    report = capsys.readouterr().out.splitlines()
    assert len(report) == len(BAD) + 2
    for name, reason in refused:
        shown = name if name.isprintable() else ascii(name)
        assert f"refused {shown}: {reason}" in report
    assert report[-2] == "left out val/ant/notes.txt: no image by its name"
    assert report[-1].endswith(
        "11 training and 4 validation images of 16x16 pixels in 2 classes; 6 refused"
    )
    train = open_store(store, SIZE).train
    assert train.labels.tolist() == [0] * 5 + [1] * 6
    kept = [path for path in sorted(source.glob("train/*/*")) if path.name not in BAD]
    assert (images_of(train) == np.stack([decode(path, SIZE) for path in kept])).all()
    assert check_store(store) == []


def test_parts_of_which_nothing_is_left(source, store):
    for number in range(8):
        (source / "train" / "bee" / f"a{number}.jpg").write_bytes(b"")
    prepare(source, store, SIZE)
    parts = read_manifest(store)["splits"]["train"]["parts"]
    assert [part["images"] for part in parts] == [4, 1, 0, 3, 2]
    kept = [path for path in sorted(source.glob("train/*/*")) if path.stat().st_size]
    images = images_of(open_store(store, SIZE).train)
    assert (images == np.stack([decode(path, SIZE) for path in kept])).all()
    assert check_store(store) == []


def test_a_class_of_which_nothing_is_left_is_an_error(source, store, capsys):
    for path in (source / "val" / "bee").iterdir():
        path.write_bytes(b"<html>")
    message = complaint(source, store, SIZE)
    assert "every image of 1 classes in val was refused (bee)" in message
    assert "refused val/bee/val_bee_0.JPEG: no image" in capsys.readouterr().out
    assert not (store / "manifest.json").exists()


def test_workers_change_nothing(source, tmp_path):
    for workers in (1, 3):
        prepare(source, tmp_path / str(workers), SIZE, workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_finished_store_is_left_alone(source, store, capsys):
    (source / "train" / "ant" / "html.jpg").write_bytes(b"<html>")
    prepare(source, store, SIZE)
    first, report = contents(store), capsys.readouterr().out
    before = {path: path.stat() for path in store.iterdir()}
    (store / "unfinished").mkdir()  # as a process leaves it that is killed at the very end
    prepare(source, store, SIZE)
    assert {path: path.stat() for path in store.iterdir()} == before
    assert contents(store) == first
    assert capsys.readouterr().out == report


def begun(source, store):
    """As a process leaves it that was killed after one part."""
    with contextlib.suppress(DataError), pytest.MonkeyPatch.context() as patch:
        finish = DataError("stop here")
        patch.setattr(preparation, "_finish", lambda *_: (_ for _ in ()).throw(finish))
        prepare(source, store, SIZE)
    for record in sorted((store / "unfinished").glob("*-*.json"))[1:]:
        record.unlink()


@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_something_else_is_not_touched(source, store, finished):
    prepare(source, store, SIZE) if finished else begun(source, store)
    before = contents(store)
    assert "with size 16, not 17: choose another folder" in complaint(source, store, SIZE + 1)
    path = source / "train" / "ant" / "train_ant_0.JPEG"
    path.write_bytes(path.read_bytes() + b"x")
    assert "from other images" in complaint(source, store, SIZE)
    assert contents(store) == before


def test_another_pillow_is_another_decoder(source, store, monkeypatch):
    begun(source, store)
    monkeypatch.setattr("PIL.__version__", "9.9")
    assert "not 9.9" in complaint(source, store, SIZE)


def test_folders_with_other_files_are_not_touched(source, store):
    store.mkdir()
    (store / "thesis.tex").write_text("")
    assert "holds other files" in complaint(source, store, SIZE)
    assert contents(store) == {"thesis.tex": b""}


def test_finished_parts_are_not_made_again(source, store, tmp_path):
    prepare(source, tmp_path / "undisturbed", SIZE)
    begun(source, store)
    (store / "train-00001.npy.1.tmp").write_bytes(b"half a par")
    (store / "unfinished" / "train-00001.json.1.tmp").write_bytes(b"{")
    (store / "train-00001.npy").write_bytes(b"of another time")
    first = (store / "train-00000.npy").stat()
    prepare(source, store, SIZE)
    assert (store / "train-00000.npy").stat() == first
    assert contents(store) == contents(tmp_path / "undisturbed")


def test_a_part_that_was_lost_is_made_again(source, store, tmp_path):
    prepare(source, tmp_path / "undisturbed", SIZE)
    begun(source, store)
    (store / "train-00000.npy").unlink()
    prepare(source, store, SIZE)
    assert contents(store) == contents(tmp_path / "undisturbed")


def test_two_at_once_are_refused(source, store):
    begun(source, store)
    with open(store / "unfinished" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another alexkern prepare is at work" in complaint(source, store, SIZE)
    prepare(source, store, SIZE)


def test_space_is_counted_first(source, store, monkeypatch):
    needed = (14 + 3 * 4) * SIZE * SIZE * 3  # three parts have sums of four bytes
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "GB are free: make room" in complaint(source, store, SIZE)
    assert not list(store.glob("*.npy"))
    usage.free = needed
    prepare(source, store, SIZE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(source, store):
    store.mkdir(mode=0o500)
    assert "cannot write" in complaint(source, store, SIZE)


def test_a_place_where_there_can_be_no_folder(source, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in complaint(source, tmp_path / "file" / "store", SIZE)
    assert "Not a directory" in complaint(source, tmp_path / "file", SIZE)


def large_source(root, images=60):
    """Enough work that a signal can hit it."""
    for split, count in (("train", images), ("val", 4)):
        for seed, class_name in enumerate(("ant", "bee")):
            (root / split / class_name).mkdir(parents=True)
            for number in range(count):
                content = encoded(smooth(375, 500, 1000 * seed + number), "JPEG", quality=90)
                (root / split / class_name / f"{number}.jpg").write_bytes(content)
    (root / "train" / "ant" / "html.jpg").write_bytes(b"<html>")
    return root


COMMAND = (
    "import sys, alexkern.data.prepare as p; p.PART_IMAGES = 4; "
    "from alexkern.cli import main; sys.exit(main(['prepare', *sys.argv[1:]]))"
)


def start(source, store, **options):
    command = [sys.executable, "-c", COMMAND, str(source), str(store), "-j", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        **options,
    )


def wait_for_records(process, store, count):
    while len(list(store.glob("unfinished/*-*.json"))) < count:
        assert process.poll() is None
        time.sleep(0.001)


def finished_parts(store):
    names = [path.stem for path in store.glob("unfinished/*-*.json")]
    return {name: (store / f"{name}.npy").stat() for name in names}


def gone(group):
    """Whether no process of a session is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def disturb(source, store, number, records, whole_group=False):
    """Send a signal after so many parts: the process, and the parts that were there then."""
    process = start(source, store)
    wait_for_records(process, store, records)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    before = time.monotonic()
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - before < 10
    deadline = time.monotonic() + 10
    while not gone(process.pid):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.01)
    return process.returncode, out, error


def go_on(source, store, undisturbed):
    """The rest, in this process; what was there must not be made again."""
    before = finished_parts(store)
    prepare(source, store, 256, 2)
    for name, status in before.items():
        assert (store / f"{name}.npy").stat() == status
    assert contents(store) == contents(undisturbed)
    return len(before)


def test_a_kill_costs_only_the_parts_under_way(tmp_path, store):
    source = large_source(tmp_path / "source")
    code, _, _ = disturb(source, store, signal.SIGKILL, 3)
    assert code == -signal.SIGKILL
    prepare(source, tmp_path / "undisturbed", 256, 2)
    assert 3 <= go_on(source, store, tmp_path / "undisturbed") < 33


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_kills_at_any_moment(tmp_path, store, whole_group):
    source = large_source(tmp_path / "source", 30)
    prepare(source, tmp_path / "undisturbed", 256, 2)
    for records in (0, 1, 2, 5, 9, 14):
        process = start(source, store)
        wait_for_records(process, store, records)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
    go_on(source, store, tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [False, True])
def test_signals_stop_it_within_seconds(tmp_path, store, number, whole_group):
    """SIGINT reaches the whole group when it comes from a terminal."""
    source = large_source(tmp_path / "source")
    code, out, error = disturb(source, store, number, 2, whole_group)
    assert (code, out) == (128 + number, "")
    assert error == "alexkern: stopped; the same command goes on from here\n"
    prepare(source, tmp_path / "undisturbed", 256, 2)
    go_on(source, store, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_work_goes_on(tmp_path, store):
    source = large_source(tmp_path / "source", 8)
    part = 4 * 256 * 256 * 3

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (part, part))  # the header is too much

    process = start(source, store, preexec_fn=limit)
    out, error = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert error.count("\n") == 1
    assert "File too large): once that is mended, the same command goes on" in error
    assert not list(store.glob("*.npy"))
    prepare(source, store, 256)
    assert check_store(store) == []


@pytest.mark.parametrize("begun", [False, True])
def test_a_worker_that_dies_is_one_line_and_the_work_goes_on(tmp_path, store, begun):
    """Also while others are still being started, which once was waited for without end."""
    source = large_source(tmp_path / "source", 16)

    def kill():
        while not multiprocessing.active_children():
            time.sleep(0.0001)
        while begun and not list(store.glob("unfinished/train-*.json")):
            time.sleep(0.001)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert "a worker process died" in complaint(source, store, 256, 2)
    thread.join()
    assert not multiprocessing.active_children()
    prepare(source, store, 256, 2)
    assert check_store(store) == []


def test_a_source_that_changes_meanwhile_is_one_line(source, store, monkeypatch):
    listed = preparation.list_source(source)
    (source / "val" / "bee" / "val_bee_1.JPEG").unlink()
    monkeypatch.setattr(preparation, "list_source", lambda *_: listed)
    assert "cannot read" in complaint(source, store, SIZE)


def test_the_command_prepares_and_checks(source, store, capsys):
    arguments = ["prepare", str(source), str(store), "--size", "16", "-j", "1"]
    assert cli.main(arguments) == 0
    assert "10 training and 4 validation images" in capsys.readouterr().out
    assert cli.main(["prepare", "--check", str(store)]) == 0
    path = store / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert cli.main(["prepare", "--check", str(store)]) == 1
    assert capsys.readouterr().out == "train-00001.npy is damaged (SHA-256 differs)\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SRC and DST"),
        (["a"], "SRC and DST"),
        (["a", "b", "--check", "c"], "SRC and DST"),
        (["a", "--check", "c"], "SRC and DST"),
        (["a", "b", "--size", "0"], "--size must be positive"),
        (["a", "b", "-j", "-1"], "--workers must be positive"),
        (["no/folder", "b"], "no folder no/folder"),
        (["--check", "no/folder"], "no/folder is no store"),
    ],
)
def test_wrong_commands_are_one_line(arguments, words, capsys):
    assert cli.main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("alexkern: ")
    assert error.count("\n") == 1
    assert words in error


def test_the_command_without_its_libraries(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "alexkern.data.prepare", None)
    monkeypatch.delattr("alexkern.data.prepare")
    assert cli.main(["prepare", "a", "b"]) == 2
    assert "pip install 'alexkern[train]'" in capsys.readouterr().err


def test_names_of_any_script_on_any_terminal(source, store, monkeypatch):
    (source / "train" / "ant" / "猫.jpg").write_bytes(noise(3, 3).tobytes())
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii", write_through=True))
    assert cli.main(["prepare", str(source), str(store), "--size", "16"]) == 0
    assert b"refused train/ant/\\u732b.jpg: no image" in terminal.getvalue()
