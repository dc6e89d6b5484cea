"""Two processes join, agree, and lose each other."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from small_runs import ROOT

from alexkern.training import processes
from alexkern.training.errors import TrainingError, UsageError
from alexkern.training.processes import (
    Peers,
    Wishes,
    agreed_start,
    joined,
    lost_peer,
    naming_lost_peers,
)

CPU = torch.device("cpu")


def start_pair(program: str, *arguments: str) -> list[subprocess.Popen]:
    """Two processes, as a launcher other than torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


# Ranks wish and state different things; what each gets is printed.
AGREEING = """
import json
import torch
import torch.distributed as dist
from alexkern.training.errors import UsageError
from alexkern.training.processes import Peers, Wishes, agreed_start, joined

def start(error=None, **given):
    try:
        with agreed_start() as facts:
            if error:
                raise error
            facts.update(given)
    except (UsageError, OSError) as error:
        return str(error)

with joined(torch.device("cpu")) as process:
    rank = process.rank
    total = torch.ones(())
    dist.all_reduce(total)
    wishes = Wishes()
    saves = [(False, rank == 1), (False, True), (False, False), (False, False)]
    stops = [(rank == 0, False), (True, False)]
    found = {
        "process": [*process[:2], str(process.device), total.item()],
        "missing": Peers().missing(patience=0),
        "wishes": [wishes(*each) for each in (*saves, *stops)],
        "drained": [wishes.drain(), wishes.drain()],
        "agreeing": start(data="digits", seed="0"),
        "differing": start(data="digits", seed=f"{rank}"),
        "long": start(table="a" * 100 + f"{rank}" + "b" * 100),
        "lacking": start(**({"data": "digits"} if rank == 0 else {})),
        "failing": start(OSError("no such folder\\nat all") if rank == 1 else None),
    }
    wishes(True, True)  # nobody waits for the answer
print(json.dumps(found))
"""


def test_two_processes_agree():
    pair = start_pair(AGREEING)
    ends = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    found = [json.loads(out) for out, _ in ends]
    assert [each.pop("process") for each in found] == [[0, 2, "cpu", 2.0], [1, 2, "cpu", 2.0]]
    assert [each.pop("failing") for each in found] == [
        "rank 1 could not start: no such folder",
        "no such folder\nat all",
    ]
    assert found[0] == found[1]
    found = found[0]
    assert found["missing"] == []
    nothing, save, stop = [False, False], [False, True], [True, False]
    # rank 1's wish is granted at the second call, with what both hand in there
    assert found["wishes"] == [nothing, save, nothing, nothing, nothing, stop]
    assert found["drained"] == [stop, nothing]
    assert found["agreeing"] is None
    must_agree = "the processes must agree on"
    assert found["differing"] == f"{must_agree} seed, which is 0 on rank 0 and 1 on rank 1"
    a, b = "a" * 30, "b" * 29
    assert found["long"] == (
        f"{must_agree} table, which is ...{a}0{b}... on rank 0 and ...{a}1{b}... on rank 1"
    )
    assert found["lacking"] == (
        f"{must_agree} data, which is digits on rank 0 and not given on rank 1"
    )


# Rank 1 is killed while rank 0 waits for it.
LOSING = """
import os, signal, time
import torch
from alexkern.training.errors import TrainingError
from alexkern.training.processes import Peers, Wishes, joined, naming_lost_peers

try:
    with joined(torch.device("cpu")) as process, naming_lost_peers(Peers()):
        wishes = Wishes()
        wishes(False, False)
        wishes(False, False)
        if process.rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        wishes(False, False)
        wishes.drain()
except TrainingError as error:
    raise SystemExit(str(error))
"""


def test_a_survivor_names_who_was_killed():
    survivor, killed = start_pair(LOSING)
    begin = time.monotonic()
    _, err = survivor.communicate(timeout=60)
    assert time.monotonic() - begin < 20  # as long as torch takes to be imported, and a second
    assert survivor.returncode == 1
    assert err == (
        f"rank 1 (process {killed.pid} on {socket.gethostname()}) has ended: this one stops too; "
        "the last checkpoint is whole, continue with --resume\n"
    )
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL


# Rank 0 fails while it has something under way in which rank 1 never takes part.
LEAVING = """
import time
import torch
from alexkern.training.processes import Wishes, joined

with joined(torch.device("cpu")) as process:
    if process.rank == 0:
        Wishes()(False, False)
        raise MemoryError("too much")
    print("joined", flush=True)
    time.sleep(60)
"""


def test_who_fails_waits_for_nobody():
    failing, waiting = start_pair(LEAVING)
    assert waiting.stdout.readline() == "joined\n"
    try:
        _, err = failing.communicate(timeout=20)
    finally:
        waiting.kill()
        waiting.communicate()
    assert failing.returncode == 1
    assert err.endswith("MemoryError: too much\n")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is many, which it cannot be: start the processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, which it cannot be"),
        ({"RANK": "first"}, "RANK is first, which it cannot be"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: start the processes with torchrun"),
        ({"RANK": None}, "WORLD_SIZE is 2, and RANK is not set: start the processes"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2, and MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is 2, and MASTER_PORT is not set"),
        ({"LOCAL_RANK": None}, "WORLD_SIZE is 2, and LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, and this machine has 1 GPUs, counted from 0"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line(monkeypatch, changed, words):
    right = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**right, "MASTER_PORT": "1", **changed}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError) as found, joined(torch.device("cuda:0")):
        pass
    assert str(found.value).startswith(words)
    assert "\n" not in str(found.value)


def test_alone_everything_is_granted_at_once(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(CPU) as process:
        assert process == (0, 1, CPU, None)
        process.note_beginning()
        assert not process.has_begun
        assert not dist.is_initialized()
        wishes = Wishes()
        assert wishes(True, False) == (True, False)
        assert wishes(False, True) == (False, True)
        assert wishes.drain() == (False, False)
        assert Peers().missing(patience=0) == []
    with agreed_start() as facts:
        facts["data"] = "digits"
    with pytest.raises(KeyError, match="mine"), agreed_start():
        raise KeyError("mine")


def peers_of(monkeypatch, *found: tuple[str, int]) -> Peers:
    monkeypatch.setattr(processes, "_gathered", lambda _: list(found))
    return Peers()


GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/tcp/pair.cc:1] Connection closed\nby ...")


def test_a_process_that_nobody_waited_for_has_ended(monkeypatch):
    here = socket.gethostname()
    with subprocess.Popen(["true"]) as ended, subprocess.Popen(["sleep", "60"]) as running:
        peers = peers_of(monkeypatch, (here, running.pid), (here, ended.pid), ("afar", ended.pid))
        assert peers.missing(patience=20) == [1]
        running.kill()
    assert peers.missing(patience=0) == [0, 1]
    assert str(lost_peer(GLOO, peers)).startswith(
        f"rank 0 (process {running.pid} on {here}), rank 1 (process {ended.pid} on {here}) have "
        "ended: "
    )


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("afar", "a process on another host has probably ended"),
        (socket.gethostname(), "another process no longer answers"),
    ],
)
def test_whom_nobody_sees_is_not_named(monkeypatch, host, words):
    peers = peers_of(monkeypatch, (socket.gethostname(), os.getpid()), (host, os.getpid()))
    monkeypatch.setattr(peers, "missing", lambda: Peers.missing(peers, 0))
    path = str(GLOO).splitlines()[0]
    assert str(lost_peer(GLOO, peers)).startswith(f"{words} ({path}): this one stops too")


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("/gloo/"), MemoryError()])
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error)) as found, naming_lost_peers(Peers()):
        raise error
    assert found.value is error


def test_a_launcher_does_not_end_who_says_why(monkeypatch):
    """As torchrun does with those that are left: SIGTERM, before the message is out."""
    monkeypatch.setattr(Peers, "missing", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(TrainingError, match="no longer answers"), naming_lost_peers(Peers()):
            raise dist.DistBackendError("NCCL error")
    finally:
        signal.signal(signal.SIGTERM, before)
