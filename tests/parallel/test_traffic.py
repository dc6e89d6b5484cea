"""What processes send each other in a step is what the formula says, byte for byte."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes
from test_columns import CPU, small

from alexkern.data import Batch
from alexkern.models import AlexNet
from alexkern.optim import KrizhevskySGD
from alexkern.parallel import make_mesh
from alexkern.training.forward import Forward
from alexkern.training.step import Scaler, Step
from bench.scaling import Layout, exchanges, gradients

BATCH, CLASSES = 8, 5
LOSS = 4 * 8  # four numbers in float64, summed by all processes


def counted(
    names: list[str], layout: Layout, dtype: torch.dtype | None
) -> tuple[list[Counter[int]], list[Counter[int]]]:
    """Of a step of each preset: bytes to each column, and bytes summed by so many processes."""
    sent: Counter[int] = Counter()
    summed: Counter[int] = Counter()
    make_operation, all_reduce = dist.P2POp, dist.all_reduce

    def operation(function, buffer, **place):
        if function is dist.isend:
            sent[place["group_peer"]] += buffer.nbytes
        return make_operation(function, buffer, **place)

    def reduction(buffer, *arguments, group=None, **keywords):
        summed[dist.get_world_size(group)] += buffer.nbytes
        return all_reduce(buffer, *arguments, group=group, **keywords)

    dist.P2POp, dist.all_reduce = operation, reduction
    mesh = make_mesh(layout.columns, layout.hybrid, CPU)
    results = [], []
    for name in names:
        preset = small(name)
        model = AlexNet(preset, CLASSES, mesh, dtype)
        mean = torch.zeros(preset.stored_size, preset.stored_size, 3)
        forward = Forward(model, mean, "torch", "off", mesh)
        forward.replicate()
        optimizer, scaler = KrizhevskySGD(model.parameters(), lr=0.1), Scaler(CPU, False, mesh)
        step = Step(forward, optimizer, scaler, 1.0, CPU, False, BATCH, mesh)
        images = BATCH // layout.feature_shares
        batch = Batch(
            torch.zeros(images, 32, 32, 3, dtype=torch.uint8),
            torch.zeros(images, dtype=torch.bool),
            torch.zeros(images, 3),
            torch.zeros(BATCH // layout.data, dtype=torch.int64),
        )
        sent.clear()
        summed.clear()
        step(batch, (3, 4))
        for result, counts in zip(results, (sent, summed), strict=True):
            result.append(Counter(counts))
    return results


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (Layout(columns=2), None),
        (Layout(columns=2), torch.float16),
        (Layout(columns=2, hybrid=True), None),
        (Layout(data=2, columns=2), None),
    ],
    ids=str,
)
def test_bytes_of_a_step(layout: Layout, dtype: torch.dtype | None) -> None:
    names = ["paper", "krizhevsky2012", "no_exchange", "exchange_conv4", "exchange_all", "owt"]
    results = in_processes(layout.processes, counted, names, layout, dtype)
    for rank, found in enumerate(results):
        column = rank % layout.columns
        for name, sent, summed in zip(names, *found, strict=True):
            preset = small(name)
            expected: Counter[int] = Counter()
            for transfer in exchanges(preset, layout, BATCH, 4, dtype and dtype.itemsize):
                if transfer.source == column:
                    expected[transfer.target] += transfer.bytes
            assert sent == expected, name
            expected = Counter({layout.processes: LOSS})
            for each in gradients(preset, CLASSES, layout, column):
                if each.processes > 1:
                    expected[each.processes] += each.bytes
            assert summed == expected, name
