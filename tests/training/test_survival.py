"""Runs that are killed, stopped, starved and poisoned, as users' are."""

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import (
    assert_same,
    newest,
    results,
    run_program,
    small_dataset,
    small_trainer,
    start_program,
    train,
    wait_for,
)

from alexkern.data import Split
from alexkern.training import checkpoint, cli
from alexkern.training.signals import StopSignal

# A run of 24 steps of 50 milliseconds or so, saved after each.
RUN = [
    *("--data", "digits", "-b", "128", "--epochs", "3", "--steps", "24", "--print-freq", "3"),
    *("--save-minutes", "0", "--colour-noise", "stdev", "--resume", "auto"),
]


def has_steps(folder, count):
    return lambda: (
        len(list(folder.glob("checkpoint-*.pt"))) >= min(count, 2)
        and max(int(path.stem.split("-")[1]) for path in folder.glob("checkpoint-*.pt")) >= count
    )


def finish(folder, program=RUN):
    result = run_program(*program, "--output", str(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder)
    return folder


def kill_and_finish(folder, undisturbed, kills, seed):
    """Kill the run at random moments, then let it end; compare all its bits."""
    moments = random.Random(seed)
    for _ in range(kills):
        process = start_program(*RUN, "--output", str(folder))
        wait_for((folder / "config.toml").exists, process)
        time.sleep(moments.uniform(0.0, 2.5))
        process.kill()
        process.communicate()
    finish(folder)
    assert_same(newest(undisturbed), newest(folder))
    assert_same(checkpoint.load(undisturbed / "best.pt"), checkpoint.load(folder / "best.pt"))
    assert results(undisturbed) == results(folder)
    assert not list(folder.glob("*.tmp"))


def test_a_killed_run_ends_with_the_same_bits(tmp_path, undisturbed):
    kill_and_finish(tmp_path, undisturbed, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path, undisturbed, seed):
    kill_and_finish(tmp_path, undisturbed, 6, seed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(tmp_path, undisturbed, number):
    """To the whole group, as a terminal and a scheduler do; with workers, who leave it alone."""
    process = start_program(*RUN, "-j", "2", "--output", str(tmp_path), start_new_session=True)
    wait_for(has_steps(tmp_path, 3), process)
    begin = time.monotonic()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert time.monotonic() - begin < 10
    assert err == f"{number.name}: saving a checkpoint; once more to end at once\n"
    step = newest(tmp_path)["step"]
    assert f"stopped by {number.name} after step {step}, and saved" in out
    finish(tmp_path)
    assert_same(newest(undisturbed), newest(tmp_path))
    assert results(undisturbed) == results(tmp_path)


def test_a_second_signal_ends_at_once(tmp_path):
    program = ["--preset", "paper", "-b", "256", "--steps", "9"]  # ten seconds a step or so
    process = start_program(*program, "--output", str(tmp_path))
    wait_for((tmp_path / "metrics.csv").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving a checkpoint")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - begin < 2


def test_a_signal_in_the_last_evaluation_ends_well(tmp_path):
    """Which takes long, with ten crops; all of the training was saved before."""
    program = ["--data", "synthetic", "--preset", "mini", "-b", "128", "--steps", "1", "--ten-crop"]
    process = start_program(*program, "-j", "0", "--output", str(tmp_path))
    wait_for(has_steps(tmp_path, 1), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM after step 1, and saved" in out
    assert "ten crops" not in out


@pytest.mark.parametrize("seconds", [0.4, 0.8])
def test_an_interrupted_start_is_one_line(seconds):
    """Most of the first seconds torch is imported."""
    begin = "import sys, time; print(flush=True); from alexkern.training.cli import main; "
    process = start_program(program=[sys.executable, "-c", begin + "sys.exit(main([]))"])
    assert process.stdout.readline() == "\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "train_alexnet.py: error: interrupted before there was anything to save\n"


def test_handlers_are_put_back():
    def before(number, frame):
        raise AssertionError

    default = signal.signal(signal.SIGTERM, before)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.received == "SIGTERM"
    assert signal.signal(signal.SIGTERM, default) is before


def limit_files(size):
    """Writes beyond ``size`` bytes fail, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path):
    finish(tmp_path, [*RUN, "--steps", "4"])
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    process = start_program(*RUN, "--output", str(tmp_path), preexec_fn=limit_files(100_000))
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.startswith("train_alexnet.py: error: cannot go on (")
    assert "File too large); the last checkpoint is whole" in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before
    assert not list(tmp_path.glob("*.tmp"))


def test_too_little_shared_memory_is_one_line(tmp_path):
    """A batch of 128 crops takes four times what a file, or a piece of such memory, may have."""
    process = start_program(
        *RUN, "-j", "2", "--output", str(tmp_path), preexec_fn=limit_files(100_000)
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("train_alexnet.py: error: no shared memory for a batch (unable to ")
    assert "File too large (27)): a larger /dev/shm" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    result = run_program("--output", str(tmp_path / "run"))
    assert result.returncode == 2
    assert "cannot write to --output" in result.stderr
    assert result.stderr.count("\n") == 1


# One batch of all digits at the paper's size, with 2 GiB more than what starting takes.
STARVED = """
import resource, sys, torch
from alexkern.training.cli import main
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), size + (2 << 30)))
sys.exit(main(["--preset", "paper", "-b", "1437", "--output", sys.argv[1]]))
"""


@pytest.mark.slow
def test_too_little_memory_is_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", STARVED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr[-500:]
    assert result.stderr.startswith("train_alexnet.py: error: out of memory (")
    assert "a smaller --batch-size" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nGPU 0 ..."),
            "out of memory (CUDA out of memory. Tried to allocate 2 MiB.): a smaller --batch-size",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCompile with ..."),
            "out of memory (CUDA error: out of memory)",
        ),
        (MemoryError(), "out of memory (MemoryError)"),
        (OSError(28, "No space left on device", "a/b"), "(a/b: No space left on device)"),
        (OSError("cannot identify"), "cannot go on (cannot identify)"),
    ],
)
def test_what_a_machine_lacks_is_one_line(monkeypatch, capsys, error, words):
    def fail(parsed):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main([]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


class Deadly:
    """Images of which one kills who asks for it."""

    def __init__(self, images):
        self._images, self._owner = images, os.getpid()

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        if index == 7 and os.getpid() != self._owner:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._images[index]


def test_a_dead_worker_is_one_line(tmp_path, monkeypatch, capsys):
    dataset = small_dataset()
    deadly = Split(Deadly(dataset.train.images), dataset.train.labels)
    monkeypatch.setattr("alexkern.data.load_dataset", lambda *_: replace(dataset, train=deadly))
    begin = ["--preset", "mini", "-b", "8", "-j", "1", "--output", str(tmp_path)]
    assert cli.main(begin) == 1
    err = capsys.readouterr().err
    assert "a process that makes batches has died" in err
    assert "fewer --workers" in err
    assert err.count("\n") == 1


# Images cannot be had in other processes than the first.
FAULTY = """
import os, sys
from alexkern.data.built_in import ResizedImages
from alexkern.training.cli import main
owner, get = os.getpid(), ResizedImages.__getitem__
def faulty(self, index):
    if os.getpid() != owner:
        raise MemoryError("no room for an image")
    return get(self, index)
ResizedImages.__getitem__ = faulty
sys.exit(main(["-j", "1", "--output", sys.argv[1]]))
"""


def test_a_worker_that_raises_is_one_line_and_no_wait(tmp_path):
    """The exception's traceback keeps the loader alive, whose workers an exit must end itself."""
    process = start_program(str(tmp_path), program=(sys.executable, "-c", FAULTY))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "out of memory (MemoryError: no room for an image)" in err
    assert err.count("\n") == 1


def test_a_loss_that_is_not_finite_is_one_line_and_spares_the_checkpoint(tmp_path, capsys):
    begin = ["-b", "128", "--output", str(tmp_path), "--epochs", "2"]
    assert cli.main([*begin, "--steps", "11"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    capsys.readouterr()
    assert cli.main([*begin, "--resume", "--lr", "1e30"]) == 1
    err = capsys.readouterr().err
    assert "not finite" in err or "the loss is" in err
    assert "lower --lr" in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


@pytest.mark.parametrize("stops", [False, True])
def test_one_bad_pixel_value_is_found_by_the_gate(tmp_path, stops):
    """A mean image with a NaN, as of a damaged store: no weight learns from it.

    The run says so and saves nothing, whether it should save after every step, or stop.
    """
    dataset = small_dataset()
    mean = dataset.mean.copy()
    mean[10, 10, 1] = np.nan
    trainer = small_trainer(replace(dataset, mean=mean), save_minutes=60.0 * stops)
    answers = itertools.chain([False], itertools.repeat(stops))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match="the loss is nan at step 1"):
        train(trainer, 5, tmp_path, stopping=lambda: next(answers))
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert not list(tmp_path.glob("*.pt"))
