"""Which implementation runs: this project's Triton kernels or plain PyTorch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "triton", "torch")

_selected: ContextVar[str | None] = ContextVar("alexkern_backend", default=None)

# What `auto` takes on a GPU. No timing on a GPU is on record yet: these follow from the bytes
# that each side moves, and an unmeasured convolution gets the vendor's. The matrix products of
# `linear` are the vendor's in any case.
_AUTO_ON_GPU = {
    "augment": "triton",
    "conv": "torch",
    "dropout": "triton",
    "linear": "triton",
    "lrn": "triton",
    "lrn_pool": "triton",
    "pool": "triton",
    "sgd": "triton",
}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of the enclosed block on one backend (this thread and async context only).

    Args:
        name: ``"triton"`` always runs this project's kernels (CPU tensors through Triton's
            interpreter), ``"torch"`` always runs the plain PyTorch reference, ``"auto"``
            chooses per op: on a GPU by what is known to be faster, on a CPU the reference.

    Raises:
        ValueError: unknown name.

    Outside any such block the environment variable ``ALEXKERN_KERNELS`` decides, and
    ``auto`` if it is not set. The choice is made in forward; backward keeps it.
    """
    token = _selected.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _selected.reset(token)


def current_backend() -> str:
    """The backend in force: the innermost :func:`use_backend`, else ``ALEXKERN_KERNELS``."""
    selected = _selected.get()
    if selected is not None:
        return selected
    return _checked(os.environ.get("ALEXKERN_KERNELS", "auto"), "ALEXKERN_KERNELS")


def runs_triton(op: str, *tensors: "torch.Tensor | None") -> bool:
    """Whether ``op`` (a stem such as ``"lrn"``) runs Triton kernels on these tensors.

    Only float32, float16 and bfloat16 have kernels; other dtypes run the reference.
    """
    import torch

    backend = current_backend()
    if backend == "torch":
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    supported = (torch.float32, torch.float16, torch.bfloat16)
    if any(tensor.dtype not in supported for tensor in given):
        return False
    return backend == "triton" or (given[0].is_cuda and _AUTO_ON_GPU[op] == "triton")
