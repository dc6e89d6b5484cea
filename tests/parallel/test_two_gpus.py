"""What needs two GPUs: the same as on a CPU, by NCCL, and the program as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import in_processes
from test_columns import gradients, small
from torch import Tensor

import alexkern
from alexkern.models import AlexNet
from alexkern.parallel import Mesh, make_mesh

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

NAMES = ["paper", "krizhevsky2012", "owt", "exchange_all"]
COUNT = 7


def on_gpus(columns: int, hybrid: bool, backend: str) -> list[dict[str, Tensor]]:
    """In one of two processes: the gradients of each preset, in float32."""
    device = torch.device("cuda", torch.cuda.current_device())
    mesh = make_mesh(columns, hybrid, device)
    return [computed(name, mesh, device, torch.float32, backend) for name in NAMES]


def computed(
    name: str, mesh: Mesh, device: torch.device, dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = AlexNet(small(name), 5, mesh).to(device, dtype, memory_format=torch.channels_last)
    with alexkern.use_backend(backend):
        found = gradients(model, mesh, COUNT)[2]
    return {name: gradient.cpu().double() for name, gradient in found.items()}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("columns", "hybrid"), [(2, False), (1, False), (2, True)])
def test_gradients_by_nccl(columns, hybrid, backend):
    """Their error is at most twice that of one GPU, and the rounding of the sums over processes."""
    parts = in_processes(2, on_gpus, columns, hybrid, backend)
    for number, name in enumerate(NAMES):
        exact = computed(name, Mesh(), torch.device("cpu"), torch.float64, "torch")
        alone = computed(name, Mesh(), torch.device("cuda:0"), torch.float32, backend)
        for parameter, gradient in exact.items():
            rows = [part[number][parameter] for part in parts if parameter in part[number]]
            split = columns > 1 and not (hybrid and parameter.startswith("conv"))
            found = torch.cat(rows) if split else rows[0]
            floor = 4 * torch.finfo(torch.float32).eps * gradient.abs().max()
            bound = 2 * (alone[parameter] - gradient).abs().max() + floor
            assert (found - gradient).abs().max() <= bound, (name, parameter)


@pytest.mark.parametrize("more", [[], ["--amp", "bf16"], ["--parallel", "hybrid"]])
def test_the_program_starts_two_columns(tmp_path, more):
    program = Path(__file__).parents[2] / "train_alexnet.py"
    arguments = ["--columns", "2", "--steps", "60", "--output", str(tmp_path)]
    finished = subprocess.run(
        [sys.executable, str(program), *arguments, *more], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert "2 processes: 1 x a network of 2 columns" in finished.stdout
    assert len(list(tmp_path.glob("checkpoint-*.pt"))) == 2
