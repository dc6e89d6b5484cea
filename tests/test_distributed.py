"""The ops in a model that is trained by several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from alexkern import use_backend
from alexkern.nn import Conv2dBiasReLU, LinearBiasReLUDropout, LRNMaxPool2d

ROOT = Path(__file__).parent.parent
RANK = """
import sys, torch
from test_distributed import data, model, loss
rank, port, backend, results = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
)
from alexkern import use_backend
parallel = torch.nn.parallel.DistributedDataParallel(model())
with use_backend(backend):
    loss(parallel, *(part.chunk(2)[rank] for part in data())).backward()
torch.save([parameter.grad for parameter in parallel.parameters()], f"{results}/{rank}")
torch.distributed.destroy_process_group()
"""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Conv2dBiasReLU(3, 8, 3, stride=2),
        LRNMaxPool2d(3, kernel_size=3, stride=2),
        nn.Flatten(),
        LinearBiasReLUDropout(8 * 3 * 3, 6, p=0.0),
        nn.Linear(6, 4),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 15, 15, generator=generator), torch.tensor([0, 3, 2, 1])


def loss(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(module(images), labels)


@pytest.mark.parametrize("backend", ["triton", pytest.param("torch", marks=pytest.mark.slow)])
def test_distributed_data_parallel(tmp_path, backend):
    """Two ranks with half of the batch each have the gradients of the whole batch."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here; this test's tensors are on the CPU")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_INTERPRET": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port, backend, str(tmp_path)],
            env=environment,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    alone = model()
    with use_backend(backend):
        loss(alone, *data()).backward()
    for rank in range(2):
        grads = torch.load(tmp_path / str(rank))
        for grad, parameter in zip(grads, alone.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad)
