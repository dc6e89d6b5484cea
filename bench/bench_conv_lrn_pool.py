"""conv2d_bias_relu_lrn_max_pool2d: the paper's layers 1 and 2 whole."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from torch import Tensor

import alexkern.ops as ops
from bench import bench_conv, work
from bench.bench_lrn_pool import plain
from bench.lab import Lab
from bench.layers import CONVOLUTIONS, NORMALISED, Convolution, tiny_convolution
from bench.operation import Subject

VARIANTS = bench_conv.VARIANTS


def subject(number: str, trial: bool = False) -> Subject:
    """The layer of that number, or a small one of its kind."""
    convolution = bench_conv.subject(f"conv{number}", trial)
    layer = CONVOLUTIONS[f"conv{number}"]
    if trial:
        layer = tiny_convolution(layer)

    def operands(batch: int, randn: Callable[..., Tensor]) -> list[Tensor]:
        # grey levels' spread: with much smaller values the normalisation is a constant
        x, w, b = convolution.operands(batch, randn)
        return [(60 * x.detach()).requires_grad_(x.requires_grad), w, b]

    return Subject(
        "conv2d_bias_relu_lrn_max_pool2d",
        f"layer{number}",
        partial(_ours, layer),
        lambda *tensors: plain(convolution.theirs(*tensors)),
        operands,
        partial(work.convolution_normalisation_pooling, layer),
    )


def tail(number: str, trial: bool = False) -> Subject:
    """The same with a gradient for the bias alone: backward without the convolution's products."""
    whole = subject(number, trial)
    layer = CONVOLUTIONS[f"conv{number}"]
    if trial:
        layer = tiny_convolution(layer)
    shape = (layer.channels, *layer.output_size)

    def operands(batch: int, randn: Callable[..., Tensor]) -> list[Tensor]:
        x, w, b = whole.operands(batch, randn)
        return [x.detach(), w.detach(), b]

    return replace(
        whole,
        op="relu_lrn_max_pool2d",
        layer=f"tail{number}",
        operands=operands,
        work=partial(work.normalisation_pooling, shape),
    )


def _ours(layer: Convolution, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ops.conv2d_bias_relu_lrn_max_pool2d(
        x,
        w,
        b,
        layer.stride,
        layer.padding,
        groups=layer.groups,
        size=5,
        kernel_size=3,
        pool_stride=2,
        alpha=1e-4,
        k=2.0,
        alpha_mode="sum",
    )


@pytest.mark.parametrize("layer", NORMALISED)
def test_whole_layer(compare_op: Callable[[Subject], None], lab: Lab, layer: str) -> None:
    compare_op(subject(layer, lab.trial))


@pytest.mark.parametrize("direction", ["backward"])
@pytest.mark.parametrize("layer", NORMALISED)
def test_tail(compare_op: Callable[[Subject], None], lab: Lab, layer: str, direction: str) -> None:
    compare_op(tail(layer, lab.trial))
