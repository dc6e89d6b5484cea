"""Functions that run in several processes at once."""

import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported torch, from which processes are forked in no time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.device_mesh", "alexkern.training.loop"]
)


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function, of a module's top level, returns in each of the processes, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(count):
            here, there = _CONTEXT.Pipe(duplex=False)
            given = (there, f"file://{folder}/store", rank, count, function, _written(arguments))
            process = _CONTEXT.Process(target=_run, args=given, daemon=True)
            process.start()
            there.close()
            ranks.append((process, here))
        results = [_received(here) for _, here in ranks]
        for process, _ in ranks:
            process.join()
    for rank, (failed, value) in enumerate(results):
        assert not failed, f"rank {rank}:\n{value}"
    return [value for _, value in results]


def _run(
    there: Connection,
    store: str,
    rank: int,
    count: int,
    function: Callable[..., Any],
    arguments: bytes,
) -> None:
    torch.set_num_threads(1)
    try:
        backends = "gloo"
        if torch.cuda.device_count() >= count:
            torch.cuda.set_device(rank)
            backends = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backends, init_method=store, rank=rank, world_size=count)
        result = False, function(*_read(arguments))
    except BaseException:
        result = True, traceback.format_exc()
    there.send_bytes(_written(result))
    there.close()
    if dist.is_initialized() and not result[0]:
        dist.destroy_process_group()


def _received(here: Connection) -> tuple[bool, Any]:
    try:
        result: tuple[bool, Any] = _read(here.recv_bytes())
    except EOFError:
        return True, "ended without a word"
    return result


def _written(value: Any) -> bytes:
    """By value: tensors would be shared otherwise."""
    whole = io.BytesIO()
    torch.save(value, whole)
    return whole.getvalue()


def _read(whole: bytes) -> Any:
    return torch.load(io.BytesIO(whole), weights_only=False)
