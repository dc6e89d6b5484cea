"""A forced configuration is the one that is launched, and only while it is forced."""

from typing import Any

import pytest
import torch

import alexkern.ops as ops
from alexkern import use_backend
from alexkern.runtime import config
from alexkern.runtime.launch import Launch, record_launches


def launched(channels: int = 32) -> list[Launch]:
    """What a convolution and a pooling launch on a GPU, forward and backward."""
    image = torch.empty(2, channels, 9, 9, dtype=torch.float16, device="meta", requires_grad=True)
    image = image.to(memory_format=torch.channels_last)
    weight = torch.empty(64, channels, 3, 3, dtype=torch.float16, device="meta", requires_grad=True)
    with use_backend("triton"), record_launches() as launches:
        output = ops.max_pool2d(ops.conv2d_bias_relu(image, weight), 3, 2)
        output.backward(torch.empty_like(output))
    return launches


def tiles(launches: list[Launch]) -> list[tuple[int, ...]]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    return [
        (*(launch.constants[name] for name in names), *launch.options.values())
        for launch in launches
        if "BLOCK_K" in launch.constants
    ]


def vectors(launches: list[Launch]) -> list[tuple[Any, ...]]:
    return [
        (launch.constants["BLOCK"] * launch.constants["VECTOR"], launch.options["num_warps"])
        for launch in launches
        if launch.kernel.__name__.startswith("max_pool")
    ]


def test_a_forced_tile_is_launched() -> None:
    shipped = tiles(launched())
    with config.forced(config.MatmulConfig(256, 64, 64, 8, 4)):
        assert set(tiles(launched())) == {(256, 64, 64, 8, 4)}
    assert tiles(launched()) == shipped
    assert len(shipped) == 3  # output, image's gradient, weight's gradient


@pytest.mark.parametrize("channels", [32, 30])
def test_a_forced_block_keeps_the_vector_that_the_tensor_allows(channels: int) -> None:
    before = [launch.constants.get("VECTOR") for launch in launched(channels)]
    with config.forced(config.PointwiseConfig(2048, 1, 2)):
        launches = launched(channels)
    assert vectors(launches) == [(2048, 2)] * 2
    assert [launch.constants.get("VECTOR") for launch in launches] == before


def test_candidates_are_distinct_and_hold_what_ships() -> None:
    for kind in (config.PointwiseConfig, config.MatmulConfig):
        found = config.candidates(kind)
        assert len(set(found)) == len(found)
    shipped = tiles(launched())
    names = [(c.block_m, c.block_n, c.block_k, c.num_warps, c.num_stages) for c in found]
    assert set(shipped) <= set(names)
