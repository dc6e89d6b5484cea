"""The processes of a run, as torchrun and other launchers start them: they join, agree and end."""

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from threading import Thread
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from alexkern.training.errors import TrainingError, UsageError

T = TypeVar("T")

_BEGUN = "begun"
_ADVICE = "start the processes with torchrun, or unset WORLD_SIZE"
_LEAVE_SECONDS = 3.0
_SHOWN = 60  # characters of a value in a message


class Process(NamedTuple):
    """One process among those of the run.

    Attributes:
        rank: Its number.
        processes: How many there are.
        device: Its own.
        attempts: What torchrun keeps while it starts the processes again; None if it keeps nothing.
    """

    rank: int
    processes: int
    device: torch.device
    attempts: Store | None = None

    def note_beginning(self) -> None:
        """Note that the run has begun, for attempts that may follow this one."""
        if self.attempts is not None:
            self.attempts.set(_BEGUN, "yes")

    @property
    def has_begun(self) -> bool:
        """Whether an attempt of the run had begun when this process was started again."""
        return self.attempts is not None and bool(self.attempts.check([_BEGUN]))


@contextmanager
def joined(device: torch.device) -> Iterator[Process]:
    """The process that this is, together with the others where WORLD_SIZE says that there are more.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT decide, so any launcher will do. On
    GPUs NCCL carries what is on them, and gloo what is not.

    Args:
        device: The kind to use: GPUs are handed out by LOCAL_RANK.

    Raises:
        UsageError: The environment contradicts itself or lacks something, or there are too few
            GPUs.
        TrainingError: The others were not found.
    """
    processes = _integer("WORLD_SIZE", 1)
    if processes == 1:
        yield Process(0, 1, device)
        return
    rank = _integer("RANK")
    if rank >= processes:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE is {processes}: {_ADVICE}")
    _integer("MASTER_PORT")
    _variable("MASTER_ADDR")
    backends = "gloo"
    if device.type == "cuda":
        device, backends = _own_gpu(), "cpu:gloo,cuda:nccl"
    try:
        store, attempts = _stores()
        # No device_id, which has the groups of a mesh split off NCCL's communicator: to leave such
        # may hang (github.com/pytorch/pytorch/issues/190396).
        dist.init_process_group(backends, store=store, rank=rank, world_size=processes)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes do not find each other ({_line(error)})") from error
    try:
        yield Process(rank, processes, device, attempts)
    except BaseException:
        # What others have yet to take part in would hold this up.
        leaving = Thread(target=_leave, daemon=True)
        leaving.start()
        leaving.join(_LEAVE_SECONDS)
        raise
    _leave()


def _leave() -> None:
    with suppress(RuntimeError):  # how the run has ended is settled
        dist.destroy_process_group()
    # Threads of gloo give back the last tensors, for which they need Python's lock; one that waits
    # for it while the interpreter ends aborts the process.
    time.sleep(0.3)


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {name} is not set: {_ADVICE}"
        ) from None


def _integer(name: str, default: int | None = None) -> int:
    if default is not None and name not in os.environ:
        return default
    text = _variable(name)
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) == 0):
        raise UsageError(f"{name} is {text}, which it cannot be: {_ADVICE}")
    return int(text)


def _own_gpu() -> torch.device:
    local_rank, gpus = _integer("LOCAL_RANK"), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UsageError(
            f"LOCAL_RANK is {local_rank}, and this machine has {gpus} GPUs, counted from 0: start "
            "at most as many processes on it"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _stores() -> tuple[Store, Store | None]:
    """Where the processes find each other; and what all attempts share, if there is such a thing.

    One that torchrun keeps outlives its workers, and holds what they wrote when it starts them
    again: each attempt has a part of it. Not so any other: nodes may count attempts differently.
    """
    store, _, _ = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return PrefixStore("attempt_0", store), None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt_{attempt}", store), PrefixStore("attempts", store)


class Peers:
    """Where the processes of the run are: made by all of them, once they have joined."""

    def __init__(self) -> None:
        self._own_host = socket.gethostname()
        self._processes = _gathered((self._own_host, os.getpid()))

    def missing(self, patience: float = 2.0) -> list[int]:
        """Ranks on this host whose process has ended.

        Args:
            patience: Seconds to wait for the first; a process's connections close before it ends.
        """
        end = time.monotonic() + patience
        while True:
            ranks = [rank for rank in self._here() if _has_ended(self._processes[rank][1])]
            if ranks or time.monotonic() >= end:
                return ranks
            time.sleep(0.05)

    def describe(self, rank: int) -> str:
        """A rank with its process and host, for messages."""
        host, number = self._processes[rank]
        return f"rank {rank} (process {number} on {host})"

    @property
    def elsewhere(self) -> bool:
        """Whether there are any on other hosts, which cannot be looked at."""
        return len(self._here()) < len(self._processes)

    def _here(self) -> list[int]:
        return [rank for rank, (host, _) in enumerate(self._processes) if host == self._own_host]


@contextmanager
def naming_lost_peers(peers: Peers) -> Iterator[None]:
    """Turn an error of communication into one that says who has ended.

    Raises:
        TrainingError: See :func:`lost_peer`.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        # torchrun ends who is left, but this process does so by itself, and says why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise lost_peer(error, peers) from error


def lost_peer(error: RuntimeError, peers: Peers) -> TrainingError:
    """What an error of communication means: who has ended, as far as can be seen from here.

    Args:
        error: What an operation of ``torch.distributed`` raised.
        peers: Of this run.
    """
    if missing := peers.missing():
        verb = "has" if len(missing) == 1 else "have"
        what = f"{', '.join(map(peers.describe, missing))} {verb} ended"
    elif peers.elsewhere:
        what = f"a process on another host has probably ended ({_line(error)})"
    else:
        what = f"another process no longer answers ({_line(error)})"
    return TrainingError(
        f"{what}: this one stops too; the last checkpoint is whole, continue with --resume"
    )


def _is_of_communication(error: RuntimeError) -> bool:
    """Errors of gloo have no type of their own; they begin with a path of its sources."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _has_ended(number: int) -> bool:
    try:
        # the name before the state, in brackets, may have any characters
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


@contextmanager
def agreed_start() -> Iterator[dict[str, str]]:
    """Prepare on all processes, and go on only if all can, and with the same facts.

    A process that fails still takes part at the end, so that no other waits for it::

        with agreed_start() as facts:
            dataset = load_dataset(...)
            facts["--data"] = dataset.name

    Yields:
        The facts, to be filled: names as a user knows them, and values.

    Raises:
        Exception: What the block raised.
        UsageError: See :func:`check_agreement`.
    """
    facts: dict[str, str] = {}
    try:
        yield facts
    except Exception as error:
        check_agreement(error)
        raise
    check_agreement(facts)


def check_agreement(facts: Mapping[str, str] | Exception) -> None:
    """Raise on all processes if one has failed, or if two differ in what must be the same.

    Args:
        facts: Names and values; or why this process, which then raises nothing here, has none.

    Raises:
        UsageError: Another one has failed, or a value differs: both are named.
    """
    if isinstance(facts, Exception):
        _gathered((_line(facts), {}))
        return
    failures, everyones = zip(*_gathered(("", dict(facts))), strict=True)
    for rank, failure in enumerate(failures):
        if failure:
            raise UsageError(f"rank {rank} could not start: {failure}")
    first = everyones[0]
    for rank, theirs in enumerate(everyones):
        for name in {**first, **theirs}:
            one, other = first.get(name, "not given"), theirs.get(name, "not given")
            if one != other:
                one, other = _difference(one, other)
                raise UsageError(
                    f"the processes must agree on {name}, which is {one} on rank 0 and {other} on "
                    f"rank {rank}"
                )


def _difference(one: str, other: str) -> list[str]:
    """Both, cut to a length that suits a line, around where they begin to differ."""
    pairs = enumerate(zip_longest(one, other))
    differs = next(place for place, (first, second) in pairs if first != second)
    start = max(differs - _SHOWN // 2, 0)
    shown = []
    for text in (one, other):
        part = " ".join(text[start : start + _SHOWN].split())
        shown.append(f"{'...' * (start > 0)}{part}{'...' * (len(text) > start + _SHOWN)}")
    return shown


def _line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _gathered(value: T) -> list[T]:
    """Everyone's, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Wish(NamedTuple):
    """What somebody wishes.

    Attributes:
        stop: The end of the run.
        save: A checkpoint.
    """

    stop: bool
    save: bool


class Wishes:
    """Agreement on when to stop and when to save, which no process waits for.

    Every process calls it equally often, and all get the same answer at the same call: what
    anybody wished at the call before. Without others a wish is granted at once.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, stop: bool, save: bool) -> Wish:
        """Hand in what this process wishes.

        Args:
            stop: Kept up until it is granted.
            save: The same; granting it fulfils what was handed in meanwhile, too.

        Returns:
            What all do now.
        """
        if not dist.is_initialized():
            return Wish(stop, save)
        granted = self.drain()
        flags = torch.tensor([stop, save and not granted.save], dtype=torch.uint8)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
        self._pending = work, flags
        return granted

    def drain(self) -> Wish:
        """The answer that is still to come, if any: after the last call, on every process."""
        if self._pending is None:
            return Wish(False, False)
        work, flags = self._pending
        self._pending = None
        work.wait()
        return Wish(*map(bool, flags.tolist()))
