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
        part: This process's.
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
    exchange = _Exchange(part, axis, dim, outgoing, sizes, dtype)
    others = _received(exchange, _sent(part, exchange))
    return torch.cat((*others[: axis.index], part, *others[axis.index :]), dim)


def to_first(
    part: Tensor, axis: Axis, dim: int, sizes: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """As :func:`gathered`, in the first process alone; the others get a tensor of size 0."""
    part = _rounded(part, dtype)
    if axis.count == 1:
        return part
    first = axis.index == 0
    outgoing = [(0, part.shape[dim]), *[(0, 0)] * (axis.count - 1)]
    incoming = sizes if first else [0] * axis.count
    exchange = _Exchange(part, axis, dim, outgoing, incoming, dtype)
    others = _received(exchange, _sent(part, exchange))
    return torch.cat((part, *others) if first else others, dim)


class Borders:
    """The maps of the neighbouring columns that are nearest, on their way.

    What is computed between this and :meth:`wait` runs beside the messages; backward, too.

    Args:
        maps: [B, C, H, W], those of one column.
        axis: The columns, side by side in this order.
        before: So many of the last maps of the column before.
        behind: So many of the first maps of the column behind.
    """

    def __init__(self, maps: Tensor, axis: Axis, before: int, behind: int) -> None:
        outgoing, incoming = [(0, 0)] * axis.count, [0] * axis.count
        if axis.index > 0:
            outgoing[axis.index - 1], incoming[axis.index - 1] = (0, behind), before
        if axis.index < axis.count - 1:
            last = maps.shape[1] - before
            outgoing[axis.index + 1], incoming[axis.index + 1] = (last, before), behind
        self._index = axis.index
        self._exchange = _Exchange(maps, axis, 1, outgoing, incoming, None)
        self._buffers = _sent(maps, self._exchange)

    def wait(self) -> tuple[Tensor, Tensor]:
        """[B, before, H, W] and [B, behind, H, W]; without maps where there is no neighbour."""
        others = _received(self._exchange, self._buffers)
        nothing = others[0].narrow(1, 0, 0)
        return (
            others[self._index - 1] if self._index > 0 else nothing,
            others[self._index] if self._index < len(others) else nothing,
        )


class _Exchange:
    """Messages to and from each other process; backward they go the other way.

    A slice of this process's tensor goes to each, and as much as it says comes from each. Nothing
    is sent where there is nothing.

    Args:
        tensor: What is sent, to know its kind.
        axis: The processes.
        dim: Of the slices.
        outgoing: To each process.
        incoming: Length of what comes from each.
        dtype: Of the messages; None for the tensor's.
    """

    def __init__(
        self,
        tensor: Tensor,
        axis: Axis,
        dim: int,
        outgoing: Sequence[Slice],
        incoming: Sequence[int],
        dtype: torch.dtype | None,
    ) -> None:
        self.dim, self.peers = dim, [peer for peer in range(axis.count) if peer != axis.index]
        self.outgoing = [outgoing[peer] for peer in self.peers]
        self.incoming = [incoming[peer] for peer in self.peers]
        self.gradient_scale = _GRADIENT_SCALE if dtype else 1.0
        self.memory_format = _memory_format(tensor)
        self._group, self._dtype, self.own_dtype = axis.group, dtype, tensor.dtype
        self._messages: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._works: list[dist.Work] = []

    def begin(
        self, sent: Sequence[Tensor], lengths: Sequence[int], scale: float = 1.0
    ) -> list[Tensor]:
        """Send one to each, ``scale`` times as large; what comes is there after :meth:`end`."""
        operations = []
        for peer, tensor, length in zip(self.peers, sent, lengths, strict=True):
            travelling = tensor if self._dtype is None else (tensor * scale).to(self._dtype)
            # one order in memory for sender and receiver, whatever strides the sender's has
            message = travelling.contiguous(memory_format=self.memory_format)
            shape = [*tensor.shape[: self.dim], length, *tensor.shape[self.dim + 1 :]]
            buffer = torch.empty(
                shape,
                dtype=message.dtype,
                device=message.device,
                memory_format=self.memory_format,
            )
            for function, each in ((dist.isend, message), (dist.irecv, buffer)):
                if each.numel():
                    operations.append(
                        dist.P2POp(function, _flat(each), group=self._group, group_peer=peer)
                    )
            self._messages.append(message)
            self._buffers.append(buffer)
        self._works = dist.batch_isend_irecv(operations) if operations else []
        return self._buffers

    def end(self, scale: float = 1.0) -> list[Tensor]:
        """Wait; returns what has come, by a ``scale``-th."""
        for work in self._works:
            work.wait()
        buffers = self._buffers
        self._messages, self._buffers, self._works = [], [], []
        if self._dtype is None:
            return buffers
        return [buffer.to(self.own_dtype) / scale for buffer in buffers]


class _Send(torch.autograd.Function):
    """Begins to send a tensor's slices; backward ends with what came back for them, added up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exchange: _Exchange) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.shape = exchange, tensor.shape
        sent = [tensor.narrow(exchange.dim, *part) for part in exchange.outgoing]
        return tuple(exchange.begin(sent, exchange.incoming))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: _Exchange = ctx.exchange
        # not in the messages' precision, which grads[0] has
        total = grads[0].new_zeros(ctx.shape, dtype=exchange.own_dtype)
        total = total.contiguous(memory_format=exchange.memory_format)
        for part, partial in zip(
            exchange.outgoing, exchange.end(exchange.gradient_scale), strict=True
        ):
            total.narrow(exchange.dim, *part).add_(partial)
        return total, None


class _Receive(torch.autograd.Function):
    """Waits for what comes; backward begins to send its gradient back."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.end())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: _Exchange = ctx.exchange
        lengths = [length for _, length in exchange.outgoing]
        exchange.begin(grads, lengths, exchange.gradient_scale)
        return None, *grads  # not read: what counts are the messages


def _sent(tensor: Tensor, exchange: _Exchange) -> tuple[Tensor, ...]:
    buffers: tuple[Tensor, ...] = torch.compiler.disable(_Send.apply)(tensor, exchange)
    return buffers


def _received(exchange: _Exchange, buffers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    others: tuple[Tensor, ...] = torch.compiler.disable(_Receive.apply)(exchange, *buffers)
    return others


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


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """In which tensors travel: the same in all processes, whose strides may differ."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def _flat(tensor: Tensor) -> Tensor:
    """All elements in their order in memory, which is dense."""
    return tensor.as_strided((tensor.numel(),), (1,))
