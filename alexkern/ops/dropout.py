"""Dropout whose mask is a function of a seed and is never stored."""

from typing import Any

import torch
from torch import Tensor

from alexkern import reference
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch
from alexkern.runtime.layout import dense_as, is_channels_last
from alexkern.runtime.operator import Operator


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    mode: str = "inverted",
    seed: Tensor | None = None,
    index_offset: int = 0,
    row_stride: int | None = None,
) -> Tensor:
    """Zero elements with probability ``p``, as :func:`torch.nn.functional.dropout`.

    Element i of the global row-major index uses word ``i % 4`` of Philox4x32-10 with counter
    ``i // 4`` and key ``seed``, and is dropped if and only if that word is below
    ``round(p * 2**32)``. One seed means one mask on every backend, device and memory format.

    Args:
        input: any shape, dense in row-major or channels_last order (kept; other strides are
            copied once). float32, float16 and bfloat16 have kernels; float64 runs the reference.
        p: probability of dropping an element, in [0, 1].
        training: if False, nothing is dropped.
        inplace: write the result into ``input`` (a temporary of its size is used).
        mode: ``"inverted"`` multiplies kept elements by 1 / (1 - p) in training and does nothing
            otherwise (PyTorch, Caffe); ``"paper"`` keeps them as they are in training and
            multiplies by 1 - p otherwise (paper section 4.2).
        seed: int64 tensor of one element on the input's device. None draws one from torch's
            generator: ``torch.manual_seed`` reproduces it, the generator advances, and a
            captured CUDA graph draws a new one at each replay.
        index_offset: global index of the first element, for a shard of a larger tensor.
        row_stride: global elements from one row (dimension 0) to the next; the number of
            elements per row if None.

    Returns:
        A tensor like ``input``; ``input`` itself if nothing is to be done or ``inplace``.

    Saves for backward: the seed (8 bytes). Backward is the same op on the gradient.

    Raises:
        ValueError: ``p`` outside [0, 1], unknown ``mode``, negative ``index_offset`` or
            ``row_stride``, or a seed that is not one int64 element on the input's device.
        RuntimeError: ``inplace`` on a leaf that requires grad or on overlapping memory, an
            input that is not floating-point, or a ``p`` that is NaN.
    """
    check_arguments(input, p, mode, seed, index_offset, row_stride)
    if p == 0.0 or input.numel() == 0 or (not training and mode == "inverted"):
        return input
    check_floating_point(input)
    scale = kept_scale(p, training, mode)
    if not training:
        return input.mul_(scale) if inplace else input * scale

    if seed is None:
        seed = draw_seed(input.device)
    if runs_triton(input):
        threshold = reference.dropout_threshold(p)
        image = input.dim() >= 3 and is_channels_last(input)
        output = _apply(input, seed, threshold, scale, index_offset, row_stride, image)
    else:
        output = reference.dropout(input, p, scale, seed.view(()), index_offset, row_stride)
    return input.copy_(output) if inplace else output


def check_arguments(
    input: Tensor,
    p: float,
    mode: str,
    seed: Tensor | None,
    index_offset: int,
    row_stride: int | None,
) -> None:
    """Refuse what :func:`dropout` refuses of these arguments."""
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p != p:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
    if mode not in ("inverted", "paper"):
        raise ValueError(f"mode must be 'inverted' or 'paper', got {mode!r}")
    if index_offset < 0 or (row_stride is not None and row_stride < 0):
        raise ValueError(
            "index_offset and row_stride must not be negative, "
            f"got index_offset={index_offset}, row_stride={row_stride}"
        )
    if seed is not None:
        _check_seed(seed, input)


def _check_seed(seed: Tensor, input: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise ValueError(f"seed must be an int64 tensor of one element, got {seed!r}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != input.device:
        raise ValueError(
            f"seed must be an int64 tensor of one element on {input.device}, got "
            f"{seed.dtype} of shape {list(seed.shape)} on {seed.device}"
        )


def check_floating_point(input: Tensor) -> None:
    """Integers cannot be dropped from."""
    if not input.is_floating_point():
        raise RuntimeError(f"dropout needs a floating-point input, got {input.dtype}")


def kept_scale(p: float, training: bool, mode: str) -> float:
    """What kept elements are multiplied by."""
    if mode == "paper":
        return 1.0 if training else 1.0 - p
    # p = 1 keeps none
    return 1.0 / (1.0 - p) if training and p < 1.0 else 1.0


def draw_seed(device: torch.device) -> Tensor:
    """A new seed from torch's generator, on the device."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _drop(input: Tensor, seed: Tensor, *arguments: Any) -> Tensor:
    *numbers, channels_last = arguments
    input = dense_as(input, channels_last)
    output = empty(input.shape, input, channels_last=channels_last)
    _launch(input, output, seed, *numbers)
    return output


def _launch(
    source: Tensor,
    result: Tensor,
    seed: Tensor,
    threshold: int,
    scale: float,
    index_offset: int,
    row_stride: int | None,
) -> None:
    count = source.numel()
    channels_last = source.dim() >= 3 and is_channels_last(source)
    columns = count // source.shape[0] if source.dim() else 1
    inner = columns // source.shape[1] if channels_last else columns
    row_stride = columns if row_stride is None else row_stride
    aligned = not channels_last and row_stride == columns and index_offset % 4 == 0
    blocks = config.pointwise(source, count)
    launch(
        device_code("dropout").dropout_apply,
        blocks.programs(count),
        source,
        result,
        seed,
        count,
        columns,
        inner,
        index_offset,
        row_stride,
        threshold,
        scale,
        CHANNELS_LAST=channels_last,
        ALIGNED=aligned,
        BLOCK=blocks.block,
        VECTOR=blocks.vector,
        num_warps=blocks.num_warps,
    )


def _save(context: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    _, seed, *context.numbers = arguments
    context.save_for_backward(seed)


def _input_grad(context: Any, output_grad: Tensor) -> tuple[Tensor]:
    # the op is linear, and its own transpose
    (seed,) = context.saved_tensors
    return (_apply(output_grad, seed, *context.numbers),)


_apply = Operator(
    "dropout(Tensor input, Tensor seed, int threshold, float scale, SymInt index_offset, "
    "SymInt? row_stride, bool channels_last) -> Tensor",
    _drop,
    fake=lambda input, *numbers: empty(input.shape, input, channels_last=numbers[-1]),
    save=_save,
    backward=_input_grad,
)
