"""Counts of FLOPs and bytes against numbers worked out apart from the code."""

import pytest
import torch

from alexkern.models import alexnet
from bench import work
from bench.layers import CONVOLUTIONS, FULLY_CONNECTED, PACKING, POOLS
from bench.record import Ceilings

H200 = Ceilings(4.3e12, {"bf16": 790e12, "tf32": 395e12})


# GFLOP and MB in bf16 at batch 128, counted by hand from the paper's table of layers
@pytest.mark.parametrize(
    ("layer", "direction", "gflop", "megabytes"),
    [
        ("conv1", "forward", 27.0, 112.9),
        ("conv1", "weight_grad", 27.0, 112.9),
        ("conv2", "forward", 57.3, 66.3),
        ("conv2", "input_grad", 57.3, 66.3),
        ("conv3", "forward", 38.3, 29.5),
        ("conv4", "forward", 28.7, 34.6),
        ("conv5", "forward", 19.1, 28.6),
    ],
)
def test_convolutions(layer: str, direction: str, gflop: float, megabytes: float) -> None:
    counted = work.convolution(CONVOLUTIONS[layer], direction, 128, 2)
    assert counted.flops / 1e9 == pytest.approx(gflop, abs=0.05)
    assert counted.bytes / 1e6 == pytest.approx(megabytes, abs=0.1)


def test_backward_of_a_convolution() -> None:
    """Two products, but one for the first layer; the output's mask is read besides."""
    first, second = CONVOLUTIONS["conv1"], CONVOLUTIONS["conv2"]
    forward = work.convolution(second, "forward", 128, 2)
    backward = work.convolution(second, "backward", 128, 2)
    assert backward.flops == 2 * forward.flops
    x, y, w = 128 * 96 * 27 * 27, 128 * 256 * 27 * 27, 256 * 48 * 25
    assert backward.bytes == 2 * (y + y + x + w + x + w + 256)
    forward, backward = (work.convolution(first, d, 128, 2) for d in ("forward", "backward"))
    assert backward.flops == forward.flops


@pytest.mark.parametrize(
    ("layer", "direction", "gflop", "megabytes"),
    [
        ("fc6", "forward", 9.66, 78.9),
        ("fc6", "backward", 19.33, 157.8),
        ("fc7", "forward", 4.29, 35.7),
        ("fc7", "backward", 8.59, 71.3),
    ],
)
def test_fully_connected(layer: str, direction: str, gflop: float, megabytes: float) -> None:
    counted = work.fully_connected(FULLY_CONNECTED[layer], direction, 128, 2)
    assert counted.flops / 1e9 == pytest.approx(gflop, abs=0.01)
    assert counted.bytes / 1e6 == pytest.approx(megabytes, abs=0.1)


@pytest.mark.parametrize(
    ("counted", "megabytes"),
    [
        (work.augmentation((224, 224), 128, 2), 58.4),
        (work.augmentation((224, 224), 128, 4), 96.9),
        # 4 rows and columns more: 128 * 3 * (228**2 - 224**2) * 2 bytes
        (work.augmentation((224, 224), 128, 2, (0, 4, 0, 4)), 59.8),
        (work.normalisation(POOLS["1"], "forward", 128, 2), 148.7),
        (work.normalisation(POOLS["1"], "backward", 128, 2), 223.0),
        (work.normalisation(POOLS["2"], "forward", 128, 4), 191.1),
        (work.pooling(POOLS["1"], 128, 2), 101.2),
        (work.pooling(POOLS["2"], 128, 2), 64.4),
        (work.pooling(POOLS["5"], 128, 2), 14.6),
        (work.normalisation_pooling(POOLS["1"], "forward", 128, 2), 101.2),
        (work.normalisation_pooling(POOLS["1"], "backward", 128, 2), 175.6),
        (work.update(60_965_224, 2), 1219.3),
        (work.update(60_965_224, 4), 1219.3),
    ],
)
def test_memory_bound_layers(counted: work.Work, megabytes: float) -> None:
    assert counted.flops == 0
    assert counted.bytes / 1e6 == pytest.approx(megabytes, abs=0.1)


def test_layers_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = alexnet("paper")
    assert work.parameters() == sum(p.numel() for p in model.parameters()) == 60_965_224
    for name, layer in CONVOLUTIONS.items():
        module = getattr(model, name)
        kernel = (layer.kernel, layer.kernel)
        assert tuple(module.weight.shape) == (layer.channels, layer.group_in, *kernel)
        assert module.stride == (layer.stride, layer.stride)
    assert model.preset.packing == tuple(PACKING.values())
    assert [layer.output_size for layer in CONVOLUTIONS.values()] == [
        (size, size) for size in (55, 27, 13, 13, 13)
    ]


def test_network_floor() -> None:
    """724.4 MMAC per image forward; a step of 4.13 GFLOP per image (no gradient of the images)."""
    forward = work.network(1, 2, training=False, response_norm=True)
    assert sum(part.flops for part in forward) == 2 * 724_406_816
    step = work.network(1, 2, training=True, response_norm=True)
    assert sum(part.flops for part in step) / 1e9 == pytest.approx(4.13, abs=0.01)

    def milliseconds(batch: int, training: bool) -> float:
        parts = work.network(batch, 2, training=training, response_norm=True)
        return 1e3 * sum(part.floor_seconds(H200, "bf16") for part in parts)

    def saved(batch: int) -> float:
        """Of these figures, which are for images in float32: they are read as bytes."""
        return 1e3 * work.Work(0, 3 * 224 * 224 * 3 * batch).floor_seconds(H200, "bf16")

    assert milliseconds(128, training=False) == pytest.approx(0.31 - saved(128), abs=0.01)
    assert milliseconds(128, training=True) == pytest.approx(1.12 - saved(128), abs=0.01)
    assert milliseconds(1024, training=True) == pytest.approx(6.76 - saved(1024), abs=0.01)


def test_normalisation_costs_no_forward_pass_of_its_own_when_fused() -> None:
    with_norm, without = (
        sum(p.bytes for p in work.network(1, 2, training=False, response_norm=norm))
        for norm in (True, False)
    )
    assert with_norm == without


def test_floor_is_the_larger_of_two_times() -> None:
    assert work.Work(790, 0).floor_seconds(H200, "bf16") == pytest.approx(1e-12)
    assert work.Work(790, 43).floor_seconds(H200, "bf16") == pytest.approx(1e-11)
    assert work.Work(790, 0).floor_seconds(H200, "tf32") == pytest.approx(2e-12)


def test_a_whole_layer_reads_its_activation_once_in_backward() -> None:
    """Beside the parts: the normalisation's reading of the activation is the mask's as well."""
    layer = CONVOLUTIONS["conv2"]
    whole = work.convolution_normalisation_pooling(layer, "backward", 128, 2)
    tail = work.normalisation_pooling(POOLS["2"], "backward", 128, 2)
    parts = work.convolution(layer, "backward", 128, 2) + tail
    assert whole.flops == parts.flops
    assert parts.bytes - whole.bytes == 128 * 256 * 27 * 27 * 2
    assert tail.bytes / 1e6 == pytest.approx(106.6 + 5.5, abs=0.1)
