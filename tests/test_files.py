"""Files appear whole or not at all."""

import os
import random
from pathlib import Path

import pytest
import torch

from alexkern.files import load_torch, replacing


def test_a_file_is_there_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as file:
        file.write(b"all")
        assert not path.exists()
    assert path.read_bytes() == b"all"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then its name: what a machine that loses power at any moment needs."""
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, call=call: done.append(name) or call(*given)
        )
    with replacing(tmp_path / "file") as file:
        file.write(b"all")
    assert done == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("stopped_by", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file(
    tmp_path: Path, stopped_by: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(stopped_by), replacing(path) as file:
        raise stopped_by(file.write(b"half of"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "below"
    with pytest.raises(OSError, match=str(path)), replacing(path):
        pass
    full = tmp_path / "full"
    with pytest.raises(OSError, match=f"No space left on device: '{full}'"), replacing(full):
        raise OSError(28, "No space left on device")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_whatever_is_damaged_is_a_value_error(tmp_path: Path, legacy: bool) -> None:
    """torch's reader raises IndexError, struct.error, AssertionError and more."""
    path = tmp_path / "weights.pt"
    content = {f"layer{number}": torch.randn(3, 4) for number in range(4)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    whole, places, reasons = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[places.randrange(len(damaged))] = places.randrange(256)
        path.write_bytes(damaged[: places.choice((None, places.randrange(len(damaged))))])
        try:
            load_torch(path)
        except ValueError as error:
            reasons.append(str(error))
    assert len(reasons) > 100
    assert all(reason and "\n" not in reason for reason in reasons)
