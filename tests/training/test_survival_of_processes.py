"""Several processes of the program are killed and stopped, and disagree, for real."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import (
    assert_same,
    newest,
    results,
    run_program,
    start_program,
    wait_for,
)

from alexkern.runtime import dispatch

# Two columns, 24 steps, saved after each.
RUN = [
    *("--data", "digits", "-b", "128", "--epochs", "3", "--steps", "24", "--print-freq", "3"),
    *("--save-minutes", "0", "--colour-noise", "stdev", "--columns", "2"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finished = run_program(*RUN, "--output", str(folder))
    assert finished.returncode == 0, finished.stderr
    return folder


def reached(folder: Path, step: int):
    return lambda: any(int(path.stem[-8:]) >= step for path in folder.glob("checkpoint-*.pt"))


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """Number of the process that a launcher started as this rank."""
    started = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for number in started:
        if f"RANK={rank}" in Path(f"/proc/{number}/environ").read_text().split("\0"):
            return int(number)
    raise AssertionError(started)


def assert_like(folder: Path, undisturbed: Path) -> None:
    assert_same(newest(folder), newest(undisturbed))
    assert results(folder) == results(undisturbed)


def test_a_killed_rank_is_named_and_the_run_goes_on(tmp_path, undisturbed):
    """To the bits of a run that nothing happened to."""
    process = start_program(*RUN, "--output", str(tmp_path), "--max-restarts", "1")
    wait_for(reached(tmp_path, 7), process)
    victim = rank_of(process, 1)
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"rank 1 (process {victim} on {socket.gethostname()}) has ended" in err
    assert "resumed" in out
    assert_like(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_all_end_within_seconds(tmp_path, undisturbed, rank):
    """And a later start goes on, also in one process."""
    process = start_program(*RUN, "--output", str(tmp_path))
    wait_for(reached(tmp_path, 5), process)
    victim = rank_of(process, rank)
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 15
    assert process.returncode == 1
    assert f"rank {rank} (process {victim}" in err
    finished = run_program(*RUN, "--output", str(tmp_path), "--resume")
    assert finished.returncode == 0, finished.stderr
    assert_like(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_saves_one_step(tmp_path, undisturbed, to_all):
    """SIGTERM to the launcher, or to every process of the group."""
    process = start_program(*RUN, "--output", str(tmp_path), start_new_session=True)
    wait_for(reached(tmp_path, 5), process)
    ranks = [rank_of(process, rank) for rank in range(2)]
    for number in (process.pid, *(ranks if to_all else [])):
        os.kill(number, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopped by" in out, err
    step = newest(tmp_path)["step"]
    assert f"after step {step}, and saved" in out
    assert step < 24
    finished = run_program(*RUN, "--output", str(tmp_path), "--resume")
    assert finished.returncode == 0, finished.stderr
    assert_like(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("the configuration", ["lr = 0.01", "lr = 0.02"]),
        pytest.param("the table of kernels", ["", ""], marks=pytest.mark.slow),
    ],
)
def test_ranks_that_disagree_are_refused(tmp_path, name, values):
    """Each with the same line, that names what differs and how; nothing is left in the folder."""
    dispatch.save(
        dispatch.Table("cpu", dispatch.versions(), {}), dispatch.table_path(tmp_path / "1", "cpu")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        rate = "0.01" if rank == 0 or name != "the configuration" else "0.02"
        if name == "the table of kernels":
            own["ALEXKERN_TABLES"] = str(tmp_path / str(rank))
        given = ["--output", str(tmp_path / "run"), "--lr", rate]
        ranks.append(start_program(*given, env={**os.environ, **place, **own}))
    for process in ranks:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert f"the processes must agree on {name}" in err
        for value in values:
            assert value in err
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
