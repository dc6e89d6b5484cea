import random
from pathlib import Path

import pytest
import torch
from small_runs import assert_same, small_trainer

from alexkern.files import save_torch
from alexkern.training import checkpoint
from alexkern.training.errors import UsageError


@pytest.fixture(scope="module")
def state():
    return small_trainer().state_dict()


def test_what_is_saved_comes_back(tmp_path, state):
    path = checkpoint.path_at(tmp_path, 3)
    save_torch(state, path)
    assert_same(checkpoint.load(path), state)
    assert_same(torch.load(path, weights_only=True), state)  # as any file of torch's
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-00000003.pt"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, state):
    path = checkpoint.path_at(tmp_path, 3)
    save_torch(state, path)
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"No space.*checkpoint-00000003\.pt"):
        save_torch(state, path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [None, b"", b"garbage", "half", "foreign", "code", "format"])
def test_unusable_checkpoints_are_one_line(tmp_path, state, content):
    path = checkpoint.path_at(tmp_path, 3)
    if content == "half":
        save_torch(state, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif content == "foreign":
        save_torch({"state_dict": {}}, path)
    elif content == "code":
        save_torch({"options": Path("/")}, path)
    elif content == "format":
        save_torch({**state, "format": checkpoint.FORMAT + 1}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"checkpoint-00000003\.pt") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_any_flipped_bit_is_refused(tmp_path, state):
    path = checkpoint.path_at(tmp_path, 3)
    save_torch({**state, "model": {"weight": torch.randn(100, 100)}, "optimizer": {}}, path)
    content = path.read_bytes()
    places = random.Random(0)
    ends = [0, 1, len(content) - 1, len(content) - 70, len(content) - 80]
    for place in ends + [places.randrange(len(content)) for _ in range(200)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"damaged|does not end with a checksum"):
            checkpoint.load(path)


def test_the_newest_whole_one_is_found(tmp_path, state):
    for step in (9, 10, 100):
        save_torch({**state, "step": step}, checkpoint.path_at(tmp_path, step))
    newest = checkpoint.path_at(tmp_path, 100)
    said: list[str] = []
    path, found = checkpoint.load_newest(tmp_path, said.append)
    assert (path, found["step"], said) == (newest, 100, [])
    damaged = bytearray(newest.read_bytes())
    damaged[5000] ^= 1
    newest.write_bytes(damaged)
    path, found = checkpoint.load_newest(tmp_path, said.append)
    assert (path.name, found["step"]) == ("checkpoint-00000010.pt", 10)
    assert [str(newest) in line and "passed over" in line for line in said] == [True]


def test_no_checkpoint_is_none_and_only_damaged_ones_an_error(tmp_path):
    assert checkpoint.load_newest(tmp_path, print) is None
    checkpoint.path_at(tmp_path, 1).write_bytes(b"")
    with pytest.raises(UsageError, match=r"no checkpoint in .* can be read"):
        checkpoint.load_newest(tmp_path, print)


def test_old_and_half_written_ones_go(tmp_path):
    """And those of later steps; but nothing of the user's, or of a process beside this one."""
    stay = [
        *("best.pt", "checkpoint-00000002.pt", "checkpoint-00000010.pt"),
        *("notes.txt", "notes.tmp", "predictions.npz.4711.tmp", "checkpoint-mine.pt"),
    ]
    go = [
        *("checkpoint-00000001.pt", "checkpoint-00000011.pt", "checkpoint-00000020.pt"),
        *("checkpoint-00000011.pt.4711.tmp", "best.pt.4711.tmp", "metrics.csv.4711.tmp"),
    ]
    for name in (*stay, *go):
        (tmp_path / name).touch()
    checkpoint.tidy(tmp_path, 10)
    assert {file.name for file in tmp_path.iterdir()} == set(stay)


def test_a_copy_under_another_name_is_not_the_newest(tmp_path, state):
    for name in ("checkpoint-00000010.pt", "checkpoint-mine.pt", "checkpoint-00000010.old.pt"):
        save_torch(state, tmp_path / name)
    path, _ = checkpoint.load_newest(tmp_path, print)
    assert path.name == "checkpoint-00000010.pt"
