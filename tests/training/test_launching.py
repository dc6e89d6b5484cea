"""A program starts its own processes; they are killed, started again, and stopped."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from small_runs import ROOT, wait_for

from alexkern.training import launch
from alexkern.training.cli import main
from alexkern.training.errors import UsageError

BASH_SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))

# Starts itself, in two processes; the second attempt waits until it is stopped.
PROGRAM = """
import os, signal, sys, time
import torch
import torch.distributed as dist
from alexkern.training.launch import launch
from alexkern.training.processes import joined
from alexkern.training.signals import StopSignal

if "WORLD_SIZE" not in os.environ:
    launch(2, 1, sys.argv[1:])
with joined(torch.device("cpu")) as process, StopSignal(echo_seconds=5.0) as stop:
    begun = process.has_begun
    total = torch.ones(())
    dist.all_reduce(total)
    process.note_beginning()
    if process.rank == 1 and not begun:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    path = f"{sys.argv[-1]}/ready-{process.rank}"
    with open(path + ".tmp", "w") as file:
        file.write(f"{os.getpid()} {total.item():.0f} {os.environ['OMP_NUM_THREADS']} {sys.argv}")
    os.replace(path + ".tmp", path)
    while not stop:
        time.sleep(0.01)
    time.sleep(0.5)
    with open(f"{sys.argv[-1]}/stopped-{process.rank}", "w") as file:
        file.write(stop.received)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_is_started_again_and_stopped(tmp_path, number):
    """Rank 1 of the first attempt is killed; the signal goes to all, as some schedulers send it."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    arguments = ["--output", str(tmp_path)]
    launcher = subprocess.Popen(
        [sys.executable, "program.py", *arguments],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ready = [tmp_path / f"ready-{rank}" for rank in range(2)]
    try:
        wait_for(lambda: all(path.exists() for path in ready), launcher)
        threads = max(len(os.sched_getaffinity(0)) // 2, 1)
        for path in ready:
            process, *found = path.read_text().split(maxsplit=3)
            command = [str(tmp_path / "program.py"), *arguments]
            assert found == ["4", str(threads), str(command)]
            os.kill(int(process), number)
    finally:
        launcher.send_signal(number)
        _, err = launcher.communicate(timeout=40)
    for rank in range(2):
        path = tmp_path / f"stopped-{rank}"
        assert path.exists(), err
        assert path.read_text() == number.name


@pytest.fixture
def started(monkeypatch):
    """What would have taken this process's place."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append([path, *command]))
    monkeypatch.setattr(sys, "argv", ["somewhere/train_alexnet.py", "ignored"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    return commands


@pytest.mark.parametrize("gpus", [0, 2, 8])
def test_the_command(started, monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    launch.launch(2, 3, ["--columns", "2", "--output=runs/a"])
    program = [os.path.abspath("somewhere/train_alexnet.py"), "--columns", "2", "--output=runs/a"]
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    assert started == [
        [sys.executable, sys.executable, "-m", "torch.distributed.run", *options, *program]
    ]
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_too_few_gpus(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError) as found:
        launch.launch(2, 0, [])
    assert str(found.value) == (
        "--columns 2 needs 2 GPUs, and this machine has 1: leave --columns out, and one process "
        "computes all columns"
    )
    assert not started


def test_what_cannot_start_is_said_once(started, tmp_path, capsys):
    (tmp_path / "checkpoint-00000001.pt").touch()
    assert main(["--columns", "2", "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} holds a run" in capsys.readouterr().err
    assert main(["--columns", "2", "--preset", "none"]) == 2
    assert "unknown preset 'none'" in capsys.readouterr().err
    assert not started


def test_restarts_need_a_folder(started):
    with pytest.raises(UsageError, match="--max-restarts 1 needs --output, the folder"):
        launch.launch(2, 1, ["--columns", "2"])
    assert not started


def test_an_echo_does_not_count_and_a_second_signal_does():
    program = (
        "import os, signal, time\n"
        "from alexkern.training.signals import StopSignal\n"
        "with StopSignal(echo_seconds=0.5):\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    time.sleep(0.6)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert found.stdout == "still here\n"
    assert found.stderr == "SIGTERM: saving a checkpoint; once more to end at once\n"
    assert found.returncode == -signal.SIGINT


@pytest.mark.parametrize("path", BASH_SCRIPTS, ids=lambda path: path.stem)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)], check=True).returncode == 0
