"""Block sizes of every kernel: frozen dataclasses from a heuristic.

The shipped configurations are for GPUs. Triton's interpreter pays per program and not per
element, so it gets larger blocks, unless a test asks for the shipped ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alexkern.runtime.launch import interpreted
from alexkern.runtime.layout import convolution_fp32_precision

# Streaming multiprocessors that a launch should fill: H200 and H100 have 132. A constant, so
# that a split sum does not depend on the GPU's, and has the same order on all that share tiles.
_MULTIPROCESSORS = 132

# Triton's limit on the elements of one block.
_LARGEST_BLOCK = 2**20

_shipped_only: ContextVar[bool] = ContextVar("alexkern_shipped_configurations", default=False)

_assumed_generation: ContextVar[int] = ContextVar("alexkern_generation", default=9)

# Of the whole process, as backward asks on autograd's threads.
_forced: "PointwiseConfig | MatmulConfig | None" = None


@contextmanager
def shipped_configurations() -> Iterator[None]:
    """Use the GPU's configurations in the interpreter too (slow: for tests)."""
    token = _shipped_only.set(True)
    try:
        yield
    finally:
        _shipped_only.reset(token)


@contextmanager
def forced(configuration: "PointwiseConfig | MatmulConfig") -> Iterator[None]:
    """Use one configuration wherever one of its kind is asked for (for tuning).

    A pointwise configuration keeps the vectors that the tensor allows.
    """
    global _forced
    before, _forced = _forced, configuration
    try:
        yield
    finally:
        _forced = before


def for_interpreter(tensor: Tensor) -> bool:
    """Whether to choose blocks for Triton's interpreter."""
    return interpreted(tensor) and not _shipped_only.get()


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True)
class PointwiseConfig:
    """``block`` elements per program, in vectors of ``vector`` that share one mask bit."""

    block: int
    vector: int
    num_warps: int

    @property
    def rows(self) -> int:
        """Vectors per program."""
        return self.block // self.vector

    def programs(self, count: int) -> tuple[int]:
        """The grid that covers ``count`` elements."""
        return (-(-count // self.block),)


def pointwise(
    tensor: Tensor,
    divisible: int,
    scalar_block: int = 1024,
    width: int = 8,
    count: int | None = None,
) -> PointwiseConfig:
    """For kernels that treat ``divisible`` neighbouring elements alike (see ``VECTOR``).

    The programs own ``count`` elements together, by default the tensor's.

    Vectors have ``width`` elements (8: 16 bytes in half precision) where it divides ``divisible``.
    Elsewhere a program takes ``scalar_block`` elements: fewer where each has addresses of its
    own that would not fit the registers.
    """
    vector = width if divisible % width == 0 else 1
    count = tensor.numel() if count is None else count
    return _pointwise(tensor, 1024 if vector > 1 else scalar_block, vector, count)


def multi_tensor(largest: Tensor, vector: int) -> PointwiseConfig:
    """For a kernel that goes over many tensors, small ones and up to the size of ``largest``."""
    block = 2048 if vector > 1 else 1024
    return _pointwise(largest, block, vector, min(largest.numel(), 2**15))


def _pointwise(tensor: Tensor, block: int, vector: int, count: int) -> PointwiseConfig:
    if isinstance(_forced, PointwiseConfig):
        return replace(_forced, vector=vector)
    if for_interpreter(tensor):
        return PointwiseConfig(min(2**17, power_of_two(max(count, 8))), vector, 4)
    return PointwiseConfig(block, vector, 4)


def images_per_program(tensor: Tensor, programs: int, batch: int) -> int:
    """For a kernel that needs ``programs`` per image, and less where they serve several images.

    As many images as leave eight programs per multiprocessor, but at most eight.
    """
    if for_interpreter(tensor):
        return batch
    return max(1, min(8, programs * batch // (8 * _MULTIPROCESSORS)))


@dataclass(frozen=True)
class ChunkConfig:
    """``block // 8`` rows of eight channels per program, of ``chunks_per_program`` per position.

    ``programs`` cover all chunks of all positions.
    """

    block: int
    chunks_per_program: int
    programs: int
    num_warps: int


def chunks_of_channels(tensor: Tensor, chunks: int, positions: int) -> ChunkConfig:
    """For ``chunks`` groups of eight channels at each of ``positions``.

    In channels_last neighbouring chunks are neighbours in memory, in NCHW positions are.
    """
    block, together = 1024, 1
    if for_interpreter(tensor):
        together = power_of_two(chunks)
        block = min(2**16, 8 * power_of_two(together * positions))
    elif not tensor.is_contiguous():
        together = min(chunks & -chunks, block // 8)  # the largest power of two in both
    programs = -(-chunks // together) * -(-positions // (block // 8 // together))
    return ChunkConfig(block, together, programs, 4)


@dataclass(frozen=True)
class MatmulConfig:
    """Tile sizes of an implicit matrix product.

    ``boxes``: operands are loaded by tensor descriptors, a tile's pixels from many images.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    boxes: bool = False

    @property
    def name(self) -> str:
        """Its numbers in the order of the fields, as in ``128-64-32-4-3`` or ``...-boxes``."""
        *numbers, boxes = astuple(self)
        return "-".join([*map(str, numbers), *(["boxes"] if boxes else [])])

    @classmethod
    def parse(cls, name: str) -> "MatmulConfig":
        """The inverse of ``name``.

        Raises:
            ValueError: Another text.
        """
        numbers = name.removesuffix("-boxes")
        block_m, block_n, block_k, num_warps, num_stages = map(int, numbers.split("-"))
        if any(power_of_two(block) != block for block in (block_m, block_n, block_k, num_warps)):
            raise ValueError(f"no tile: {name!r}")
        return cls(block_m, block_n, block_k, num_warps, num_stages, numbers != name)


@contextmanager
def assumed_generation(major: int) -> Iterator[None]:
    """Choose for GPUs of this compute capability where tensors are on none (for compiling)."""
    token = _assumed_generation.set(major)
    try:
        yield
    finally:
        _assumed_generation.reset(token)


def generation(tensor: Tensor) -> int:
    """Major number of the compute capability of a tensor's GPU: 9 are Hopper's."""
    if not tensor.is_cuda or torch.version.hip:
        return _assumed_generation.get()
    return torch.cuda.get_device_capability(tensor.device)[0]


# By the size of an element: shapes whose accumulators fit the registers and whose stages fit
# shared memory, with wgmma and 16-byte copies on sm_90.
_TENSOR_CORE_TILES = {
    2: (
        MatmulConfig(256, 128, 64, 8, 3),
        MatmulConfig(128, 256, 64, 8, 3),
        MatmulConfig(128, 128, 64, 8, 3),
        MatmulConfig(256, 64, 64, 8, 3),
        MatmulConfig(128, 64, 64, 4, 3),
        MatmulConfig(64, 64, 64, 4, 3),
    ),
    4: (
        MatmulConfig(128, 128, 32, 8, 3),
        MatmulConfig(256, 64, 32, 8, 3),
        MatmulConfig(128, 64, 32, 4, 3),
        MatmulConfig(64, 64, 32, 4, 3),
    ),
}
# What the model below expects of an H200 in half precision: products per second of its tensor
# cores, and bytes per second from the L2 cache into shared memory.
_PRODUCTS, _L2_BYTES = 395e12, 6.6e12


def matmul(
    source: Tensor,
    other: Tensor,
    groups: int,
    group_channels: int,
    m: int,
    n: int,
    k: int,
    *,
    summed: bool,
) -> MatmulConfig:
    """For ``groups`` products of [m, k] by [k, n] that gather pixels of ``source``.

    ``other`` is what else is read or written pixel by pixel, ``summed``: k is split until all
    multiprocessors are busy. Large tiles only where 16-byte accesses are possible (channels_last,
    channels per group and strides that fit): one address per element would not fit the registers.
    Among these the one that a model of an H200 finds fastest; it
    knows no more than that a tile takes the longer of its loads and its products, and that each
    multiprocessor works on whole tiles.
    """
    if isinstance(_forced, MatmulConfig):
        return _forced
    if for_interpreter(source):
        block_n = min(max(16, power_of_two(n)), 512)
        block_k = min(max(16, power_of_two(k)), _LARGEST_BLOCK // 512)
        block_m = min(max(16, power_of_two(m)), _LARGEST_BLOCK // max(block_n, block_k))
        return MatmulConfig(block_m, block_n, block_k, 4, 1)
    aligned = _aligned(source) and group_channels % 8 == 0
    size = source.element_size()
    if size == 4 and convolution_fp32_precision() == "ieee":
        return MatmulConfig(128, 64, 16, 8, 2) if aligned else MatmulConfig(32, 32, 16, 4, 2)
    if not aligned:
        return MatmulConfig(64, 64, 32, 8, 2) if size == 2 else MatmulConfig(32, 32, 16, 4, 2)

    def seconds(tile: MatmulConfig) -> float:
        """Per multiprocessor, up to a factor that all tiles share."""
        loads = (tile.block_m + tile.block_n) * size / _L2_BYTES
        products = tile.block_m * tile.block_n * size / 2 / _PRODUCTS
        tiles = groups * -(-m // tile.block_m) * -(-n // tile.block_n)
        share = tiles / _MULTIPROCESSORS if summed else -(-tiles // _MULTIPROCESSORS)
        return share * max(loads, products)

    tiles = _TENSOR_CORE_TILES[size]
    if generation(source) >= 9 and _aligned(other):
        return min(tiles, key=seconds)
    # accumulators share the registers with the operands, or with addresses
    most_n = 128 if _aligned(other) else 64
    small = [tile for tile in tiles if tile.block_m <= 128 and tile.block_n <= most_n]
    return replace(min(small, key=seconds), num_warps=8)


def _aligned(tensor: Tensor) -> bool:
    """Whether a tensor is seen to allow 16-byte accesses along its channels."""
    return all(stride == 1 or stride % 16 == 0 for stride in tensor.stride())


@dataclass(frozen=True)
class ColumnSumConfig:
    """Tile of pixels by channels of a sum over pixels."""

    block_m: int
    block_n: int
    num_warps: int


def column_sum(tensor: Tensor, pixels: int, channels: int, channels_last: bool) -> ColumnSumConfig:
    """For the epilogue's backward: wide along the dimension that is contiguous in memory."""
    if for_interpreter(tensor):
        block_n = min(power_of_two(channels), 1024)
        return ColumnSumConfig(min(power_of_two(pixels), _LARGEST_BLOCK // block_n), block_n, 4)
    return ColumnSumConfig(32, 64, 4) if channels_last else ColumnSumConfig(256, 8, 4)


def column_splits(tensor: Tensor, programs: int, length: int, block: int, least_steps: int) -> int:
    """Into how many partial sums to cut a column's sum of ``length``, in steps of ``block``.

    As many as give each multiprocessor eight programs, whose loads wait for memory side by side;
    but at least ``least_steps`` each.
    """
    if for_interpreter(tensor):
        return 1
    return max(1, min(8 * _MULTIPROCESSORS // programs, length // (least_steps * block)))


def product_splits(tensor: Tensor, programs: int, length: int, block: int) -> int:
    """Into how many partial sums to cut a product's sum of ``length``, in steps of ``block``.

    Of those that give two programs at most to a multiprocessor, the fewest for which the busiest
    multiprocessor has least to do; but at least eight steps each.
    """
    if for_interpreter(tensor):
        return 1
    most = min(2 * _MULTIPROCESSORS // programs, length // (8 * block))
    return min(
        range(1, max(most, 1) + 1),
        key=lambda count: -(-programs * count // _MULTIPROCESSORS) / count,
    )


def partial_sums(result: Tensor, splits: int) -> tuple[int, int]:
    """Partial sums taken at a time, and numbers per program, where each is a sum of ``splits``."""
    if for_interpreter(result):
        return power_of_two(splits), min(1024, power_of_two(result.numel()))
    # enough programs for all multiprocessors before several threads share a number
    rows = 1 if result.numel() > 1024 * _MULTIPROCESSORS else min(64, power_of_two(splits))
    return rows, 1024 if rows == 1 else 32


def candidates(
    kind: type[PointwiseConfig] | type[MatmulConfig], element_size: int = 2
) -> list[Any]:
    """What a tuning tries: the shipped configurations for that size of elements among others.

    Not all fit every GPU: a launch of one that does not raises.
    """
    if kind is PointwiseConfig:
        return [
            PointwiseConfig(block, 1, warps)
            for block in (256, 512, 1024, 2048, 4096)
            for warps in (2, 4, 8)
            if 1 <= block // (32 * warps) <= 32
        ]
    if element_size == 4:
        return list(_TENSOR_CORE_TILES[4])
    return [
        *_TENSOR_CORE_TILES[2],
        MatmulConfig(128, 128, 64, 4, 3),
        MatmulConfig(128, 128, 64, 8, 4),
        MatmulConfig(256, 128, 32, 8, 4),
        MatmulConfig(128, 128, 32, 8, 4),
        MatmulConfig(128, 64, 32, 4, 4),
        MatmulConfig(256, 128, 64, 8, 3, boxes=True),
        MatmulConfig(128, 256, 64, 8, 4, boxes=True),
        MatmulConfig(128, 128, 64, 8, 4, boxes=True),
        MatmulConfig(128, 64, 64, 4, 3, boxes=True),
    ]
