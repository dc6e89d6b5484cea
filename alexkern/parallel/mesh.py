"""Where a process stands among those of a run."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Axis:
    """A process in a row of processes.

    Attributes:
        index: Its place.
        count: How many there are.
        group: All of them; None for one alone.
    """

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    def portion(self, rows: range) -> range:
        """Those of the rows that are this process's."""
        return portion(rows, self.index, self.count)


@dataclass(frozen=True)
class Mesh:
    """The processes of a run: replicas of a network, each of one or more columns.

    Process r is column ``r % columns`` of replica ``r // columns``, so that the columns of a
    replica are neighbours, on one machine as a rule.

    Attributes:
        data: The replicas, among which the rows of a batch are divided.
        columns: The columns, among which each layer's units are divided.
        hybrid: Columns divide the fully connected layers alone. The convolutions are replicated
            in all of them, and divide their replica's rows once more (Krizhevsky 2014, "One weird
            trick for parallelizing convolutional neural networks").
    """

    data: Axis = Axis()
    columns: Axis = Axis()
    hybrid: bool = False

    @property
    def processes(self) -> int:
        """How many there are in all."""
        return self.data.count * self.columns.count

    @property
    def convolution_columns(self) -> Axis:
        """The columns among which a convolution's units are divided."""
        return Axis() if self.hybrid else self.columns

    @property
    def convolution_replicas(self) -> Axis:
        """The processes with the same convolutions."""
        if not self.hybrid or self.columns.count == 1:
            return self.data
        assert dist.group.WORLD is not None
        return Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.processes > 1:
            dist.all_reduce(tensor)


def make_mesh(columns: int, hybrid: bool, device: torch.device) -> Mesh:
    """The processes of ``torch.distributed`` as a mesh; all of them call it.

    Args:
        columns: Columns of a network.
        hybrid: See :class:`Mesh`.
        device: Of this process.

    Raises:
        ValueError: The processes do not divide into columns.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if columns < 1 or processes % columns:
        raise ValueError(f"{processes} processes do not divide into {columns} columns each")
    if processes == 1:
        return Mesh()
    mesh = init_device_mesh(
        device.type, (processes // columns, columns), mesh_dim_names=("data", "columns")
    )
    data, inner = (
        Axis(mesh.get_local_rank(name), mesh.size(number), mesh.get_group(name))
        for number, name in enumerate(("data", "columns"))
    )
    return Mesh(data, inner, hybrid and columns > 1)


def portion(rows: range, index: int, count: int) -> range:
    """One of ``count`` nearly equal runs of rows, which together are all of them."""
    return rows[index * len(rows) // count : (index + 1) * len(rows) // count]
