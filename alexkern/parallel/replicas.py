"""Replicas of a part of a network, whose gradients are added up."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from alexkern.parallel.mesh import Axis


class _Part(nn.Module):
    """A function as the forward pass of the layers that it uses."""

    def __init__(self, function: Callable[..., Tensor], layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._function = function

    def forward(self, *inputs: Any) -> Tensor:
        return self._function(*inputs)


def replicated(
    function: Callable[..., Tensor], layers: Mapping[str, nn.Module], axis: Axis
) -> Callable[..., Tensor]:
    """The function, after whose backward pass all replicas have the same gradients.

    They are the sum of what each replica computed, not the mean: a replica's loss is to be its
    share of the batch's mean, however unequal the replicas' shares are. Sums are made bucket by
    bucket beside the rest of the backward pass.

    Args:
        function: Uses the parameters of ``layers``.
        layers: By name. Their parameters' ``requires_grad`` counts as it is now.
        axis: The replicas.
    """
    if axis.count == 1:
        return function
    parallel = DistributedDataParallel(
        _Part(function, layers),
        process_group=axis.group,
        gradient_as_bucket_view=True,
    )
    parallel.register_comm_hook(axis.group, _sum)
    return parallel


def _sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    summed: Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed
