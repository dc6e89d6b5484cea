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
# The same, as a global that torch.compile can guard: it traces no context variable before 2.14.
_last_selected: str | None = None


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
            takes the reference on a CPU and the kernels on a GPU, where each pass of a
            convolution goes to whatever :mod:`alexkern.runtime.dispatch` knows to be fastest.

    Raises:
        ValueError: unknown name.

    Outside any such block the environment variable ``ALEXKERN_KERNELS`` decides, and
    ``auto`` if it is not set. The choice is made in forward; backward keeps it. A compiled function
    is compiled again where it is called under another backend (of which threads that differ at the
    same time may see each other's); the variable is read once, when it is compiled.
    """
    global _last_selected
    token = _selected.set(_checked(name, "backend"))
    before, _last_selected = _last_selected, name
    try:
        yield
    finally:
        _selected.reset(token)
        _last_selected = before


def current_backend() -> str:
    """The backend in force: the innermost :func:`use_backend`, else ``ALEXKERN_KERNELS``."""
    import torch

    selected = _last_selected if torch.compiler.is_compiling() else _selected.get()
    if selected is not None:
        return selected
    return _checked(os.environ.get("ALEXKERN_KERNELS", "auto"), "ALEXKERN_KERNELS")


def runs_triton(*tensors: "torch.Tensor | None") -> bool:
    """Whether an op runs Triton kernels on these tensors.

    Only float32, float16 and bfloat16 have kernels; other dtypes run the reference.
    """
    import torch

    backend = current_backend()
    if backend == "torch":
        return False
    supported = (torch.float32, torch.float16, torch.bfloat16)
    on_gpu = False
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype not in supported:
                return False
            on_gpu = on_gpu or tensor.is_cuda
    return backend == "triton" or on_gpu
