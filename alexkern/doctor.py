"""What is installed, who computes which op and why, and whether it computes right here."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import alexkern
from alexkern import ops, optim, use_backend
from alexkern.runtime import dispatch
from alexkern.runtime.backend import current_backend, runs_triton

# float32 sums of some dozen terms are off by a few roundings; mistakes are larger by far.
_ALLOWED = 1000 * 2.0**-24


@dataclass(frozen=True)
class Check:
    """One op: who computes it, and the largest error of what it gave.

    Attributes:
        op: Its name.
        runs: ``"triton kernels"``, or ``"plain PyTorch"``.
        error: Of output and gradients against float64, relative to the largest value; None if the
            op raised.
        problem: What is wrong; empty if nothing is.
    """

    op: str
    runs: str
    error: float | None
    problem: str = ""


def information() -> dict[str, Any]:
    """Versions, GPUs, the backend in force, and the tables that `auto` goes by."""
    try:
        import triton
    except ImportError:  # as on other systems than Linux
        versions = {"triton": None}
    else:
        versions = {"triton": triton.__version__}
    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        }
        for index in range(torch.cuda.device_count())
    ]
    folders = dict.fromkeys((dispatch.SHIPPED.resolve(), dispatch.user_folder().resolve()))
    return {
        "versions": {
            "alexkern": alexkern.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **versions,
        },
        "gpus": gpus,
        "backend": current_backend(),
        "why": _why(bool(gpus)),
        "tables": [str(path) for folder in folders for path in sorted(folder.glob("*.json"))],
    }


def _why(gpu: bool) -> str:
    """The consequence of the backend in force on this machine."""
    backend = current_backend()
    if backend == "torch":
        return "plain PyTorch was asked for"
    if backend == "triton":
        where = "on the GPU" if gpu else "in Triton's interpreter, as torch finds no GPU"
        return f"this project's kernels were asked for; they run {where}"
    if gpu:
        return "kernels on the GPU; convolutions pass by pass as measured, else by the vendor"
    return "plain PyTorch, as torch finds no GPU"


def checks(device: torch.device) -> list[Check]:
    """Run every op on small tensors of ``device``, and compare with float64 on a CPU."""
    return [_check(name, function, device) for name, function in _OPS.items()]


def _check(name: str, function: Callable[..., Tensor], device: torch.device) -> Check:
    operands = [tensor.to(device).requires_grad_() for tensor in _operands()]
    exact = [tensor.double().requires_grad_() for tensor in _operands()]
    runs = "triton kernels" if runs_triton(operands[0]) else "plain PyTorch"
    try:
        results = _results(function, operands)
        with use_backend("torch"):
            truths = _results(function, exact)
        error = max(map(_error, results, truths))
    except Exception as failure:
        return Check(name, runs, None, f"{type(failure).__name__}: {failure}"[:300])
    return Check(name, runs, error, "" if error <= _ALLOWED else "wrong result")


def _operands() -> list[Tensor]:
    """An image, the weight of a convolution, and a bias."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    return [randn(2, 8, 9, 7), randn(16, 8, 3, 3) / 8, randn(16)]


def _results(function: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    output = function(*operands)
    grads = torch.autograd.grad(output.square().sum(), operands, allow_unused=True)
    return [output, *(grad for grad in grads if grad is not None)]


def _error(result: Tensor, truth: Tensor) -> float:
    error = (result.detach().cpu().double() - truth.detach()).abs().max()
    return float(error / truth.detach().abs().max())


def _linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ops.linear_bias_relu_dropout(x.flatten(1)[:, :72], w.flatten(1), b, seed=_seed(x))


def _seed(tensor: Tensor) -> Tensor:
    """Equal seeds drop the same units everywhere."""
    return torch.tensor(7, device=tensor.device)


def _whole(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ops.conv2d_bias_relu_lrn_max_pool2d(x, w, b, 1, 1, size=5, kernel_size=3, pool_stride=2)


def _augment(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    pixels = torch.arange(2 * 9 * 7 * 3, dtype=torch.int32, device=x.device) % 251
    corners = torch.tensor([[1, 0], [2, 1]], device=x.device)
    mean = torch.full((7, 6, 3), 100.0, device=x.device)
    images = pixels.to(torch.uint8).view(2, 9, 7, 3)
    # which learns nothing; the sum keeps a gradient to ask for
    return ops.augment(images, corners, corners[:, 1] > 0, mean, 50.0) + 0 * x.sum()


def _step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A parameter after an update."""
    parameter = w.detach().clone().requires_grad_()
    parameter.grad = 2 * w.detach()
    optim.KrizhevskySGD([parameter], lr=0.1).step()
    return parameter.detach() + 0 * x.sum()


_OPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "conv2d_bias_relu": lambda x, w, b: ops.conv2d_bias_relu(x, w, b, 2, 1),
    "local_response_norm": lambda x, w, b: ops.local_response_norm(x, 5),
    "max_pool2d": lambda x, w, b: _image(ops.max_pool2d(x, 3, 2)),
    "lrn_max_pool2d": lambda x, w, b: ops.lrn_max_pool2d(x, 5, 3, 2),
    "conv2d_bias_relu_lrn_max_pool2d": _whole,
    "dropout": lambda x, w, b: ops.dropout(x, seed=_seed(x)),
    "linear_bias_relu_dropout": _linear,
    "augment": _augment,
    "KrizhevskySGD": _step,
}


def _image(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)  # a pair only if indices are asked for
    return result
