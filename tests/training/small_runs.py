"""Small runs for the tests of training."""

import csv
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from alexkern.data import Dataset, Split, principal_colours
from alexkern.parallel import Mesh
from alexkern.training import checkpoint
from alexkern.training.loop import Outlet, Trainer
from alexkern.training.options import resolve

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, str(ROOT / "train_alexnet.py"))


def small_dataset(classes: int = 3, held_out: int = 10) -> Dataset:
    """Noise on red, green, blue or grey: 40 images to train on, and up to 10 held out."""
    images = np.random.default_rng(0).integers(0, 150, (50, 36, 36, 3), np.uint8)
    labels = np.arange(50) % classes
    images += (100 * np.eye(4, 3, dtype=np.uint8))[labels][:, None, None]
    names = tuple(f"class {label}" for label in range(classes))
    until = 40 + held_out
    train, val = Split(images[:40], labels[:40]), Split(images[40:until], labels[40:until])
    colours = principal_colours(np.cov(images[:40].reshape(-1, 3).T))
    mean = images[:40].mean(0, dtype=np.float32)
    return Dataset("colours", names, train, val, True, mean, colours)


def small_trainer(
    dataset: Dataset | None = None, device: str = "cpu", mesh: Mesh | None = None, **given
) -> Trainer:
    """Five steps an epoch, three epochs; on the CPU, where sums have one order, by default."""
    chosen = {"preset": "mini", "batch_size": 8, "epochs": 3, "workers": 0, "print_freq": 2}
    options = resolve({**chosen, **given}, {})
    return Trainer(options, dataset or small_dataset(), torch.device(device), mesh)


def train(trainer: Trainer, steps: int, folder: Path, **given) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer.train(steps, Outlet(folder, trainer.step, **given))
    return trainer


def newest(folder: Path) -> dict:
    """The state in the newest checkpoint of a run."""
    found = checkpoint.load_newest(folder, print)
    assert found is not None
    return found[1]


def assert_same(first: dict, second: dict) -> None:
    """The same bits in two states, but for their options."""
    assert first.keys() == second.keys()
    for name in first.keys() - {"options"}:
        one, other = _flat(first[name]), _flat(second[name])
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
            assert same, (name, key, value, other[key])


def _flat(value) -> dict:
    if isinstance(value, dict):
        return {
            (name, *rest): leaf
            for name, part in value.items()
            for rest, leaf in _flat(part).items()
        }
    if isinstance(value, list | tuple):
        return _flat(dict(enumerate(value)))
    return {(): value}


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def results(folder: Path) -> list[dict[str, str]]:
    """Rows without what depends on the machine's speed."""
    timings = {"images_per_second", "data_wait_share"}
    return [
        {name: value for name, value in row.items() if name not in timings} for row in rows(folder)
    ]


def start_program(*arguments: str, program: Sequence[str] = PROGRAM, **given) -> subprocess.Popen:
    command = [*program, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **given})


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    process = start_program(*arguments)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen, seconds: float = 60
) -> None:
    """Until it holds, which it must before the process ends or time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
