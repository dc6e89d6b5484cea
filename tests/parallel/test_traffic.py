"""What processes send each other in a step is what the formula says, byte for byte."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes
from test_columns import CPU, small
from torch.nn import functional

import alexkern
from alexkern.models import AlexNet
from alexkern.parallel import make_mesh, replicated
from bench.scaling import Layout, exchanges, gradients

BATCH, CLASSES = 8, 5


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
        model = AlexNet(small(name), CLASSES, mesh, dtype)
        layers = dict(model.named_children())
        first = {name: each for name, each in layers.items() if name.startswith("conv")}
        last = {name: each for name, each in layers.items() if name.startswith("fc")}
        features = replicated(model.features, first, mesh.convolution_replicas)
        classify = replicated(model.classify, last, mesh.data)
        sent.clear()
        summed.clear()
        images = torch.zeros(BATCH // layout.feature_shares, 3, 32, 32)
        rows = range(BATCH // layout.data)
        with alexkern.use_backend("torch"):
            logits = classify(features(images), torch.zeros(2, dtype=torch.int64), rows)
        target = torch.zeros(len(logits), dtype=torch.int64)
        (functional.cross_entropy(logits, target) if logits.numel() else logits.sum()).backward()
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
            expected.clear()
            for each in gradients(preset, CLASSES, layout, column):
                if each.processes > 1:
                    expected[each.processes] += each.bytes
            assert summed == expected, name
