"""What several processes cost: the bytes that they send, and the time of a step that follows.

The bytes are counted from a preset, and hold for every link. The times are *predictions*: each
process computes at the roofline of :mod:`bench.work`, corrected by a GPU's record where there is
one, and sends at the speed of a :class:`Link`. docs/two-gpus.md says what the model leaves out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from alexkern.models import PRESETS, AlexNet, Preset
from bench import work
from bench.compile_record import GPUS
from bench.layers import CONVOLUTIONS
from bench.record import Ceilings, Record

_GRADIENT_BYTES = 4  # float32, also under mixed precision
_ITEM_BYTES = {"bf16": 2, "tf32": 4}


@dataclass(frozen=True)
class Layout:
    """How processes share a network and its batch.

    Attributes:
        data: Shares of the batch; the weights of equal columns are kept equal.
        columns: Parts of every layer's kernels and units, which see the same images.
        hybrid: Only fully connected layers are in columns. Each process convolves its own part of
            the images with all kernels.
    """

    data: int = 1
    columns: int = 1
    hybrid: bool = False

    def __str__(self) -> str:
        parts = (("data", self.data), ("columns", self.columns))
        name = " x ".join(f"{what} {number}" for what, number in parts if number > 1)
        return f"{name}, hybrid" if self.hybrid else name or "one process"

    @property
    def processes(self) -> int:
        """Of all shares and columns."""
        return self.data * self.columns

    @property
    def feature_columns(self) -> int:
        """Parts of every convolution's kernels."""
        return 1 if self.hybrid else self.columns

    @property
    def feature_shares(self) -> int:
        """Parts of the batch that are convolved apart."""
        return self.processes // self.feature_columns


# What bench_parallel.py runs on a CPU: the paper's network with a quarter of the maps and units.
CPU_PRESET = replace(
    PRESETS["paper"], name="quarter", widths=(24, 64, 96, 96, 64), fc_widths=(1024, 1024)
)
CPU_CLASSES, CPU_BATCH = 10, 16
CPU_LAYOUTS = (
    Layout(),
    Layout(columns=2),
    Layout(data=2),
    Layout(columns=2, hybrid=True),
    Layout(data=2, columns=2),
)


class Transfer(NamedTuple):
    """What one column sends another in a step; ``layer`` is the one that needs it forward."""

    layer: str
    direction: str
    source: int
    target: int
    bytes: int


def exchanges(
    preset: Preset,
    layout: Layout,
    batch: int,
    item_bytes: int,
    travelling_bytes: int | None = None,
) -> list[Transfer]:
    """All that the columns of one share of the batch send each other in a step.

    A layer of one group needs every column's part of its input, a normalisation across all maps
    those next to its own. Backward is the mirror image: the gradients of what came go back.

    Args:
        preset: The network.
        layout: How it is shared.
        batch: Images of all shares together.
        item_bytes: Size of an element: 2 in half precision, 4 in float32.
        travelling_bytes: That of what travels in another precision: all but what normalisations
            need. None for no other.

    Raises:
        ValueError: A layer or the batch cannot be shared so.
    """
    _check(preset, layout, batch)
    columns, rows = range(layout.columns), batch // layout.data
    pairs = [(source, target) for source in columns for target in columns if source != target]
    rightward = [pair for pair in pairs if pair[1] == pair[0] + 1]
    leftward = [pair for pair in pairs if pair[1] == pair[0] - 1]
    forward: list[Transfer] = []
    travelling = travelling_bytes or item_bytes

    def send(
        layer: str, between: Iterable[tuple[int, int]], elements: int, each: int = travelling
    ) -> None:
        size = rows * elements * each
        forward.extend(Transfer(layer, "forward", *pair, size) for pair in between if size)

    channels, side, norm = 3, preset.crop_size, preset.response_norm
    for layer in preset.convolutions:
        if layer.groups == 1 and layer.name != "conv1" and not layout.hybrid:
            send(layer.name, pairs, channels // layout.columns * side**2)
        side, channels = layer.output_size(side), layer.width
        for step in layer.steps:
            if step == "pool":
                side = preset.pooled_size(side)
            if step == "norm" and norm and norm.groups == 1 and not layout.hybrid:
                send(f"{layer.name} norm", leftward, (norm.size - 1) // 2 * side**2, item_bytes)
                send(f"{layer.name} norm", rightward, norm.size // 2 * side**2, item_bytes)
    inputs = (channels * side**2, preset.fc_widths[0])
    for name, width, groups in zip(("fc6", "fc7"), inputs, preset.fc_groups, strict=True):
        # in the hybrid, part of the rows instead of part of each row: as many
        if groups == 1 or (layout.hybrid and name == "fc6"):
            send(name, pairs, width // layout.columns)
    to_first = [pair for pair in pairs if pair[1] == 0]
    send("fc8", to_first, preset.fc_widths[1] // layout.columns)
    backward = [
        sent._replace(direction="backward", source=sent.target, target=sent.source)
        for sent in reversed(forward)
    ]
    return forward + backward


def _check(preset: Preset, layout: Layout, batch: int) -> None:
    columns, norm = layout.columns, preset.response_norm
    shared = list(zip(("fc6", "fc7"), preset.fc_widths, preset.fc_groups, strict=True))
    if not layout.hybrid:
        shared += [(layer.name, layer.width, layer.groups) for layer in preset.convolutions]
        if norm and norm.groups > 1:
            shared.append(("the normalisation", norm.groups, norm.groups))
    for name, width, groups in shared:
        if width % columns or (groups > 1 and groups % columns):
            raise ValueError(
                f"preset {preset.name!r}: {name}, of {groups} groups and width {width}, cannot be "
                f"shared by {columns} columns"
            )
    if batch % layout.data or batch % layout.feature_shares:
        raise ValueError(f"a batch of {batch} cannot be shared by {layout.processes} processes")


class Gradients(NamedTuple):
    """Gradients of one process, summed over ``processes``, each ``stride`` ranks from the next."""

    layers: str
    processes: int
    stride: int
    bytes: int

    @property
    def sent_bytes(self) -> int:
        """By each of the processes, which form a ring."""
        return 2 * (self.processes - 1) * self.bytes // self.processes


def gradients(preset: Preset, num_classes: int, layout: Layout, column: int = 0) -> list[Gradients]:
    """What a process of this column sums with its equals in every step, in the order of backward.

    The gradients are float32. Only column 0 has fc8.
    """
    with torch.device("meta"):
        layers = dict(AlexNet(preset, num_classes).named_children())
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    last = sizes.pop("fc8") * (column == 0)
    convolutions = sum(size for name, size in sizes.items() if name.startswith("conv"))
    connected = (sum(sizes.values()) - convolutions) // layout.columns + last
    convolutions //= layout.feature_columns
    shares, stride = layout.feature_shares, layout.feature_columns
    return [
        Gradients("fully connected", layout.data, layout.columns, _GRADIENT_BYTES * connected),
        Gradients("convolutions", shares, stride, _GRADIENT_BYTES * convolutions),
    ]


@dataclass(frozen=True)
class Link:
    """A way between two processes.

    Attributes:
        name: For tables.
        bytes_per_second: Of one process, in each direction.
        latency: Seconds of one call that sends next to nothing.
        sources: Where speed and latency come from; docs/two-gpus.md says what was made of them.
    """

    name: str
    bytes_per_second: float
    latency: float
    sources: tuple[str, ...] = ()


_NCCL, _NCCL_TESTS = (f"https://github.com/NVIDIA/{name}/issues" for name in ("nccl", "nccl-tests"))
NVLINK = Link("NVLink", 370e9, 10e-6, (f"{_NCCL}/1442", f"{_NCCL}/1984"))
PCIE = Link(
    "PCIe", 50e9, 10e-6, ("https://firmwaresecurity.com/2019/05/31/pcie-5-0-spec-released",)
)
INFINIBAND = Link("InfiniBand", 47e9, 30e-6, (f"{_NCCL_TESTS}/290", f"{_NCCL_TESTS}/214"))
ETHERNET = Link("Ethernet", 12e9 / 8, 30e-6, (f"{_NCCL_TESTS}/119", f"{_NCCL_TESTS}/214"))


@dataclass(frozen=True)
class Cluster:
    """Equal machines; ``between`` is each process's share of what connects them."""

    inside: Link
    between: Link = INFINIBAND
    processes_per_node: int = 8

    def link(self, processes: int, stride: int = 1) -> Link:
        """What a group of processes, each ``stride`` ranks from the next, sends over.

        Where it has several processes on a machine, these share what they would send outside.
        """
        if (processes - 1) * stride < self.processes_per_node:
            return self.inside
        together = self.between.bytes_per_second * max(self.processes_per_node // stride, 1)
        speed = min(self.inside.bytes_per_second, together)
        return replace(self.between, bytes_per_second=speed)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step: computing, exchanging, waiting for sums of gradients."""

    compute: float
    exchange: float
    wait: float

    @property
    def total(self) -> float:
        """None of the three runs beside another."""
        return self.compute + self.exchange + self.wait


def step_time(
    compute: float,
    hiding: float,
    layout: Layout,
    sent: Iterable[Transfer],
    summed: Sequence[Gradients],
    cluster: Cluster,
) -> StepTime:
    """Put together what a step takes.

    Exchanges wait for each other. The fully connected layers' gradients are summed beside the
    convolutions' backward pass, which takes ``hiding`` seconds; the convolutions' own after it.
    Last come four numbers, of the loss, over all processes.
    """
    connected, convolutions = (_sum_seconds(each, cluster) for each in summed)
    everyone = cluster.link(layout.processes)
    wait = max(0.0, connected - hiding) + convolutions
    wait += everyone.latency * (layout.processes > 1)
    return StepTime(compute, _exchange_seconds(sent, cluster.link(layout.columns)), wait)


def _exchange_seconds(sent: Iterable[Transfer], link: Link) -> float:
    """A call for each point of exchange, as long as the column that sends or receives most."""
    loads: dict[tuple[str, str], dict[tuple[str, int], int]] = {}
    for transfer in sent:
        load = loads.setdefault((transfer.layer, transfer.direction), {})
        for end in (("source", transfer.source), ("target", transfer.target)):
            load[end] = load.get(end, 0) + transfer.bytes
    heaviest = sum(max(load.values()) for load in loads.values())
    return len(loads) * link.latency + heaviest / link.bytes_per_second


def _sum_seconds(summed: Gradients, cluster: Cluster) -> float:
    if summed.processes == 1:
        return 0.0
    link = cluster.link(summed.processes, summed.stride)
    return link.latency + summed.sent_bytes / link.bytes_per_second


def predicted_step(
    layout: Layout,
    cluster: Cluster,
    batch: int,
    dtype: str = "bf16",
    target: str = "sm_90",
    floor_share: float = 1.0,
) -> StepTime:
    """The paper's network, trained on several GPUs.

    Args:
        layout: How they share it.
        cluster: What connects them.
        batch: Images of all GPUs together.
        dtype: ``"bf16"`` (mixed precision) or ``"tf32"``.
        target: Which GPU of :data:`bench.compile_record.GPUS`.
        floor_share: Share of the roofline's speed that one GPU reaches; see :func:`measured_share`.
    """
    gpu, item_bytes = GPUS[target], _ITEM_BYTES[dtype]
    ceilings = Ceilings(gpu.copy_bytes, {"bf16": gpu.half_flops, "tf32": gpu.tf32_flops})
    paper = PRESETS["paper"]
    summed = gradients(paper, 1000, layout)
    images, rows = batch // layout.feature_shares, batch // layout.data

    def seconds(*parts: work.Work) -> float:
        return sum(part.floor_seconds(ceilings, dtype) for part in parts) / floor_share

    def features(direction: str) -> float:
        return seconds(
            *work.features(direction, images, item_bytes, columns=layout.feature_columns)
        )

    def classifier(direction: str) -> float:
        return seconds(*work.classifier(direction, rows, item_bytes, columns=layout.columns))

    owned = sum(each.bytes for each in summed) // _GRADIENT_BYTES
    compute = (
        seconds(work.augmentation(CONVOLUTIONS["conv1"].shape[1:], images, item_bytes))
        + sum(part(way) for part in (features, classifier) for way in ("forward", "backward"))
        + seconds(work.update(owned, item_bytes))
    )
    sent = exchanges(paper, layout, batch, item_bytes)
    return step_time(compute, features("backward"), layout, sent, summed, cluster)


def measured_share(record: Record | None) -> float:
    """Share of the roofline's speed at which this library's training step ran; 1 if unmeasured."""
    for measured in record.measurements if record else ():
        key = measured.key
        if (key.suite, key.layer, key.direction) == ("network", "paper", "training") and (
            key.batch == 128 and key.variant == "alexkern" and measured.seconds
        ):
            return measured.floor_share
    return 1.0


def cpu_step(
    layout: Layout, batch: int, alone: Mapping[int, float], link: Link, cores: int
) -> StepTime:
    """A step of bench_parallel.py, from what it measured beside.

    Args:
        layout: How the processes share the network and the batch.
        batch: Images of all processes together.
        alone: Seconds of a step of one process, by two sizes of its batch. What grows with the
            batch is shared by all processes, what does not, by columns: it is their weights'.
        link: See :func:`measured_link`.
        cores: Processes beyond these take turns.
    """
    (few, short), (many, long) = sorted(alone.items())
    per_image = (long - short) / (many - few)
    own = (long - many * per_image) / layout.columns + batch * per_image / layout.processes
    return step_time(
        own * max(1, layout.processes / cores),
        0.0,  # nothing hides: gloo computes where the network does
        layout,
        exchanges(CPU_PRESET, layout, batch, 4),
        gradients(CPU_PRESET, CPU_CLASSES, layout),
        Cluster(link),
    )


def measured_link(swaps: Mapping[int, float]) -> Link:
    """From the seconds in which two processes swap a small and a large message, by bytes."""
    (small, latency), (large, seconds) = sorted(swaps.items())
    return Link("gloo", (large - small) / (seconds - latency), latency)
