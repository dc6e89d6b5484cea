"""The processes of a run, as torchrun and other launchers start them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from alexkern.training.errors import UsageError


class Process(NamedTuple):
    """One process among those of the run.

    Attributes:
        rank: Its number.
        processes: How many there are.
        device: Its own.
    """

    rank: int
    processes: int
    device: torch.device


@contextmanager
def joined(device: torch.device) -> Iterator[Process]:
    """The process that this is, together with the others where WORLD_SIZE says that there are more.

    Args:
        device: The kind to use: GPUs are handed out by LOCAL_RANK.

    Raises:
        UsageError: The environment says that there are more, and not where.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        yield Process(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        raise UsageError(
            f"WORLD_SIZE is {world}, and the processes do not find each other ({error}): start "
            "them with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
