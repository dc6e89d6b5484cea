"""The only file that launches kernels and allocates their results."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alexkern.runtime.layout import is_channels_last

# Kernels compute offsets in 32 bits up to here. A block's masked lanes may lie past the end of
# a tensor, hence the margin.
_INT32_LIMIT = 2**31 - 2**24

_logger = logging.getLogger("alexkern")
_poison = False
# Triton's interpreter keeps what it runs in globals.
_interpreter = Lock()


@dataclass(frozen=True)
class Launch:
    """A launch as it would have been made: what a static compilation needs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


_recorder: ContextVar[list[Launch] | None] = ContextVar("alexkern_recorder", default=None)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches of the enclosed block instead of making them.

    With tensors on the ``meta`` device, an op's whole host path runs without a GPU and without
    data, and yields every kernel in the configuration that a GPU would get.
    """
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def are_recorded() -> bool:
    """Whether launches are collected instead of made."""
    return _recorder.get() is not None


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every result with NaN (or the largest integer) first, to expose unwritten elements."""
    global _poison
    before, _poison = _poison, True
    try:
        yield
    finally:
        _poison = before


def empty(
    shape: Sequence[int],
    like: Tensor,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Uninitialised dense tensor on the device of ``like``, in NCHW or channels_last order."""
    dtype = like.dtype if dtype is None else dtype
    if channels_last:
        stored = (shape[0], *shape[2:], shape[1])
        result = torch.empty(stored, dtype=dtype, device=like.device).movedim(-1, 1)
    else:
        result = torch.empty(tuple(shape), dtype=dtype, device=like.device)
    if _poison and not result.is_meta:
        result.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)
    return result


def like(tensor: Tensor) -> Tensor:
    """Uninitialised: of the shape and dtype of a tensor, dense in the order of its memory."""
    channels_last = tensor.dim() >= 3 and is_channels_last(tensor)
    return empty(tensor.shape, tensor, channels_last=channels_last)


def tensor_descriptor(tensor: Tensor, block: Sequence[int]) -> Any:
    """A tensor for a kernel that loads boxes of ``block`` elements, zeros where it ends.

    Raises:
        RuntimeError: its innermost dimension is not dense, or rows are not aligned to 16 bytes.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    try:
        return TensorDescriptor.from_tensor(tensor, list(block))
    except AssertionError as error:
        raise RuntimeError(f"no boxes in a tensor of strides {tensor.stride()}: {error}") from None


def underlying(argument: Any) -> Any:
    """The tensor of a descriptor; any other argument as it is."""
    return argument if isinstance(argument, Tensor) else getattr(argument, "base", argument)


def device_code(stem: str) -> ModuleType:
    """The module ``kernels/<stem>.py``, imported (and triton with it) when first needed."""
    return import_module(f"alexkern.kernels.{stem}")


def interpreted(tensor: Tensor) -> bool:
    """Whether kernels on this tensor run in Triton's interpreter (CPU tensors do)."""
    return tensor.device.type == "cpu"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Run ``kernel`` over ``grid`` on the device of its tensors.

    Args:
        kernel: a ``@triton.jit`` function with a constexpr INT64 as its last parameter.
        grid: numbers of programs; nothing is launched if one of them is zero.
        arguments: tensors, their descriptors and numbers, in the kernel's order; all on one device.
        num_warps: per program.
        num_stages: of software pipelining.
        constants: the kernel's constexpr parameters but INT64, which is decided here.

    Raises:
        RuntimeError: tensors on different devices, or on a CPU without Triton's interpreter.
    """
    if 0 in grid:
        return
    tensors = [underlying(value) for value in arguments if not isinstance(value, int | float)]
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {device} and {tensor.device}!"
            )
    constants["INT64"] = any(map(_is_long, tensors))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if (recorder := _recorder.get()) is not None:
        recorder.append(Launch(kernel, grid, arguments, constants, options))
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, **options)
        return
    _check_interpreter(kernel, device)
    with _interpreter:
        kernel[grid](*arguments, **constants)


def _is_long(tensor: Tensor) -> bool:
    """Whether 32 bits may not reach from a tensor's first element to its last, in memory."""
    if tensor.untyped_storage().nbytes() <= _INT32_LIMIT:
        return False  # known at a fifth of the cost
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((extent - 1) * stride for extent, stride in extents) > _INT32_LIMIT


def _check_interpreter(kernel: Any, device: torch.device) -> None:
    """Allow CPU tensors in Triton's interpreter only."""
    from triton.runtime.interpreter import InterpretedFunction

    if device.type != "cpu" or not isinstance(kernel, InterpretedFunction):
        raise RuntimeError(
            f"the triton backend got tensors on {device} and Triton is compiling for a GPU; move "
            "them to a GPU, use the torch backend, or set TRITON_INTERPRET=1 in the environment "
            "before triton is first imported, to run kernels on the CPU in Triton's interpreter"
        )
    _start_interpreter()


@cache
def _start_interpreter() -> None:
    """Say once that the interpreter runs, and let it compute as a GPU does."""
    from triton.runtime.interpreter import interpreter_builder

    _check_interpreter_numpy()
    # By default only the interpreter checks every integer operation for overflow, which takes
    # half of its time.
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    _call_device_functions_directly()
    _logger.warning("alexkern: kernels run on the CPU in Triton's interpreter (slow)")


def _call_device_functions_directly() -> None:
    """Spare our kernels' device functions what takes longer than most of them.

    Calling one, the interpreter replaces all of triton.language once more, as it did for the
    kernel that calls.
    """
    from triton.runtime.interpreter import InterpretedFunction

    call = InterpretedFunction.__call__

    def call_directly(function: Any, *arguments: Any, **keywords: Any) -> Any:
        if function.fn.__module__.startswith("alexkern.kernels."):
            return function.rewrite()(*arguments, **keywords)
        return call(function, *arguments, **keywords)

    InterpretedFunction.__call__ = call_directly


def _check_interpreter_numpy() -> None:
    """Triton 3.6's interpreter cannot loop over a range with numpy 2.4 or newer."""
    import numpy
    import triton

    def release(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} does not work with numpy "
            f"{numpy.__version__}; install 'numpy<2.4' or a newer triton"
        )
