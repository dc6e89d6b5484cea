"""Steps of a network in several processes on a CPU, to hold the model of docs/two-gpus.md against.

Every process has one thread, and they speak by gloo. What the model needs is measured beside them:
steps of one process with two sizes of batch, and two processes that swap messages.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from alexkern.data import Batch
from alexkern.models import AlexNet
from alexkern.optim import KrizhevskySGD
from alexkern.parallel import make_mesh
from alexkern.training.forward import Forward
from alexkern.training.step import Scaler, Step
from bench.conftest import Keep
from bench.record import Key
from bench.scaling import CPU_BATCH, CPU_CLASSES, CPU_LAYOUTS, CPU_PRESET, Layout

_ROUNDS, _WARM_UP = 40, 3
_CPU = torch.device("cpu")

Call = Callable[[], Any]
Make = Callable[..., Call]


@contextmanager
def _member(rank: int, processes: int, store: str) -> Iterator[None]:
    """One of the processes, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def _follow(
    index: int, processes: int, store: str, calls: int, make: Make, arguments: tuple[Any, ...]
) -> None:
    """All processes but the first, which is timed."""
    with _member(index + 1, processes, store):
        call = make(*arguments)
        for _ in range(calls):
            call()


def _time(benchmark: Any, processes: int, make: Make, *arguments: Any) -> None:
    """Time the call that ``make`` makes in each of the processes, where all call at once."""
    calls = 1 if benchmark.disabled else _WARM_UP + _ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        followers = spawn(
            _follow,
            (processes, store, calls, make, arguments),
            nprocs=processes - 1,
            join=False,
        )
        with _member(0, processes, store):
            benchmark.pedantic(make(*arguments), rounds=_ROUNDS, warmup_rounds=_WARM_UP)
            while not followers.join():
                pass


def _step(layout: Layout, batch_size: int) -> Call:
    """The training step of this process."""
    mesh = make_mesh(layout.columns, layout.hybrid, _CPU)
    model = AlexNet(CPU_PRESET, CPU_CLASSES, mesh)
    stored, crop = CPU_PRESET.stored_size, CPU_PRESET.crop_size
    forward = Forward(model, torch.zeros(stored, stored, 3), "torch", "off", mesh)
    forward.replicate()
    step = Step(
        forward,
        KrizhevskySGD(model.parameters(), lr=0.0),
        Scaler(_CPU, False, mesh),
        divisor=1.0,
        device=_CPU,
        capture=False,
        batch_size=batch_size,
        mesh=mesh,
    )
    images = batch_size // layout.feature_shares
    batch = Batch(
        torch.zeros(images, crop, crop, 3, dtype=torch.uint8),
        torch.zeros(images, dtype=torch.bool),
        torch.randn(images, 3),
        torch.arange(batch_size // layout.data) % CPU_CLASSES,
    )
    return lambda: step(batch, (3, 4))


def _swap(size: int) -> Call:
    """Send the other of two processes so many bytes, and receive as many."""
    other = 1 - dist.get_rank()
    outgoing, incoming = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))

    def swap() -> None:
        operations = [
            dist.P2POp(dist.isend, outgoing, other),
            dist.P2POp(dist.irecv, incoming, other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return swap


@pytest.mark.parametrize("size", [4, 2**22])
def test_swap(benchmark: Any, keep: Keep, size: int) -> None:
    _time(benchmark, 2, _swap, size)
    keep(Key("parallel", "swap", "bytes", "", "", size, ""))


_CASES = [(Layout(), CPU_BATCH // 2), *((layout, CPU_BATCH) for layout in CPU_LAYOUTS)]


@pytest.mark.parametrize(("layout", "batch"), _CASES, ids=str)
def test_step(benchmark: Any, keep: Keep, layout: Layout, batch: int) -> None:
    _time(benchmark, layout.processes, _step, layout, batch)
    keep(Key("parallel", "alexnet", CPU_PRESET.name, "training", "fp32", batch, str(layout)))
