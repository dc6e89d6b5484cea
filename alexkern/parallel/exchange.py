"""The seam between columns: what crosses from one to another, forward and backward.

Messages go from process to process, in autograd as well: a gradient travels back the way its
activation came, and is added up where that was sent from.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alexkern.parallel.mesh import Axis

Slice = tuple[int, int]
"""Start and length along the dimension that is exchanged."""

# Gradients that travel in half precision do so this much larger: they are of a mean over the
# batch, and would be too small for float16. The 2012 code's were of the sum over 128 images.
_GRADIENT_SCALE = 128.0


def gathered(
    part: Tensor, axis: Axis, dim: int, sizes: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """The parts of all processes, one after the other, in all of them.

    Args:
        part: This process's, of the same memory format in all.
        axis: The processes.
        dim: Along which the parts differ.
        sizes: Of the parts along ``dim``.
        dtype: In which parts travel, and to which this process's own is rounded too, so that all
            see the same; None for their own.
    """
    part = _rounded(part, dtype)
    if axis.count == 1:
        return part
    outgoing = [(0, part.shape[dim])] * axis.count
    return _exchanged(part, axis, dim, outgoing, sizes, dtype)


def to_first(
    part: Tensor, axis: Axis, dim: int, sizes: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """As :func:`gathered`, in the first process alone; the others get a tensor of size 0."""
    part = _rounded(part, dtype)
    if axis.count == 1:
        return part
    outgoing = [(0, part.shape[dim]), *[(0, 0)] * (axis.count - 1)]
    incoming = sizes if axis.index == 0 else [0] * axis.count
    return _exchanged(part, axis, dim, outgoing, incoming, dtype)


def exchanged_borders(maps: Tensor, axis: Axis, before: int, behind: int) -> tuple[Tensor, int]:
    """A column's maps with its neighbours' nearest.

    Args:
        maps: [B, C, H, W], those of one column.
        axis: The columns, side by side in this order.
        before: So many of the last maps of the column before.
        behind: So many of the first maps of the column behind.

    Returns:
        [B, from C to before + C + behind, H, W], and the number of maps before this column's own.

    Raises:
        ValueError: A column has fewer maps than its neighbour needs.
    """
    own = maps.shape[1]
    if max(before, behind) > own:
        raise ValueError(
            f"a window needs {max(before, behind)} maps of the next column, which has {own}"
        )
    outgoing, incoming = [(0, 0)] * axis.count, [0] * axis.count
    outgoing[axis.index], incoming[axis.index] = (0, own), own
    if axis.index > 0:
        outgoing[axis.index - 1], incoming[axis.index - 1] = (0, behind), before
    if axis.index < axis.count - 1:
        outgoing[axis.index + 1], incoming[axis.index + 1] = (own - before, before), behind
    first = before if axis.index > 0 else 0
    return _exchanged(maps, axis, 1, outgoing, incoming, None), first


def _exchanged(tensor: Tensor, *arguments: Any) -> Tensor:
    exchanged: Tensor = torch.compiler.disable(_Exchange.apply)(tensor, *arguments)
    return exchanged


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor, and backward its gradient, with the precision of ``dtype``."""
    if dtype is None:
        return tensor
    result: Tensor = _Round.apply(tensor, dtype)
    return result


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return tensor.to(dtype).to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * _GRADIENT_SCALE).to(ctx.dtype).to(grad.dtype) / _GRADIENT_SCALE, None


class _Exchange(torch.autograd.Function):
    """Process i sends the slice ``outgoing[j]`` of its tensor to j, itself included.

    What arrives is laid side by side, ``incoming[j]`` wide from j. Backward, each such part of the
    gradient goes back to its sender, where all that come back for a slice are added.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        axis: Axis,
        dim: int,
        outgoing: Sequence[Slice],
        incoming: Sequence[int],
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.axis, ctx.dim, ctx.outgoing, ctx.incoming = axis, dim, outgoing, incoming
        ctx.dtype, ctx.shape, ctx.memory_format = dtype, tensor.shape, _memory_format(tensor)
        sent = [tensor.narrow(dim, *part) for part in outgoing]
        return torch.cat(_swap(sent, axis, dim, incoming, ctx.memory_format, dtype), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths = [length for _, length in ctx.outgoing]
        sent = grad.split(list(ctx.incoming), ctx.dim)
        scale = _GRADIENT_SCALE if ctx.dtype else 1.0
        received = _swap(sent, ctx.axis, ctx.dim, lengths, ctx.memory_format, ctx.dtype, scale)
        total = grad.new_zeros(ctx.shape).contiguous(memory_format=ctx.memory_format)
        for part, partial in zip(ctx.outgoing, received, strict=True):
            total.narrow(ctx.dim, *part).add_(partial)
        return total, None, None, None, None, None


def _swap(
    sent: Sequence[Tensor],
    axis: Axis,
    dim: int,
    lengths: Sequence[int],
    memory_format: torch.memory_format,
    dtype: torch.dtype | None,
    scale: float = 1.0,
) -> list[Tensor]:
    """Send each process its own of ``sent``; returns what comes from each, so long along ``dim``.

    Nothing is sent where there is nothing. With a ``dtype`` messages are ``scale`` times as large.
    """
    received, operations = [], []
    for peer, (tensor, length) in enumerate(zip(sent, lengths, strict=True)):
        if peer == axis.index:
            received.append(tensor)
            continue
        shape = [*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]]
        # one order in memory for sender and receiver, whatever strides the sender's has
        message = (tensor if dtype is None else (tensor * scale).to(dtype)).contiguous(
            memory_format=memory_format
        )
        incoming = torch.empty(
            shape, dtype=message.dtype, device=tensor.device, memory_format=memory_format
        )
        for function, buffer in ((dist.isend, message), (dist.irecv, incoming)):
            if buffer.numel():
                operations.append(
                    dist.P2POp(function, _flat(buffer), group=axis.group, group_peer=peer)
                )
        received.append(incoming)
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    if dtype is None:
        return received
    own = sent[axis.index]
    return [each if each is own else each.to(own.dtype) / scale for each in received]


def _memory_format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _flat(tensor: Tensor) -> Tensor:
    """All elements in their order in memory, which is dense."""
    return tensor.as_strided((tensor.numel(),), (1,))
