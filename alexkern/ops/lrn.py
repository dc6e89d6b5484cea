"""Local response normalisation across channels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from alexkern import reference
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, empty, launch, like
from alexkern.runtime.layout import dense, dense_as, is_channels_last, outer_channels_inner
from alexkern.runtime.operator import Operator

# Channels of a window beside its own, beyond which the kernels' registers do not hold it.
WIDEST = 16


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    alpha_mode: str = "mean",
    groups: int = 1,
) -> Tensor:
    """Divide each value by a power of its neighbourhood's energy across channels.

    ``output[c] = input[c] / (k + s * sum(input[j]**2))**beta`` with j from ``c - size // 2`` to
    ``c + (size - 1) // 2``. The paper (section 3.3) is ``size=5, alpha=1e-4, beta=0.75, k=2,
    alpha_mode="sum"``; its released code has ``alpha_mode="mean"``.

    Args:
        input: [N, C, *], three or more dimensions, NCHW or channels_last (kept; other strides
            are copied once). float32, float16 and bfloat16 have kernels, computing in float32;
            other dtypes, windows of more than 17 channels, and a k or alpha that lets the
            denominator reach zero (``k <= 0`` or ``alpha < 0``) run the reference.
        size: channels in a window, at least 1.
        alpha: see ``alpha_mode``.
        beta: the exponent.
        k: the constant, called bias elsewhere.
        alpha_mode: ``"mean"`` sets s to alpha / size, as PyTorch; ``"sum"`` to alpha, as the
            paper.
        groups: number of equal groups of channels whose borders no window crosses (the
            paper's code normalises each GPU's channels alone). Must divide C.

    Returns:
        A tensor like ``input``. Autocast does not change the dtype (PyTorch's op returns
        float32 there).

    Saves for backward: the input. Backward is deterministic; double backward raises.

    Raises:
        ValueError: fewer than three dimensions, unknown ``alpha_mode``, or bad ``groups``.
        RuntimeError: ``size`` below 1.
        TypeError: ``size`` is not an int.
    """
    normalisation = checked_normalisation(input.shape, size, alpha, beta, k, alpha_mode, groups)
    if input.numel() == 0:
        return input
    if not normalisation.fits_kernels(input.shape[1]) or not runs_triton(input):
        return reference.local_response_norm(input, *normalisation)
    output: Tensor = _forward(dense(input), *normalisation)
    return output


class Normalisation(NamedTuple):
    """LRN's numbers, after their checks; ``scale`` is what the sum of squares is multiplied by."""

    size: int
    scale: float
    beta: float
    k: float
    groups: int

    def reach(self, channels: int) -> tuple[int, int]:
        """Channels before and after a window's own; a wider window than the group is cut."""
        most = channels // self.groups - 1
        return min(self.size // 2, most), min((self.size - 1) // 2, most)

    def fits_kernels(self, channels: int) -> bool:
        """Whether the window fits the registers, and no denominator can be zero or negative.

        The kernels compute it beyond the borders, too, where the sum of squares is zero.
        """
        narrow = self.size <= WIDEST or sum(self.reach(channels)) <= WIDEST
        return narrow and self.k > 0 and self.scale >= 0

    def packed(self, channels: int, channels_last: bool) -> bool:
        """Whether eight channels are neighbours in memory: 16 bytes in half precision."""
        divides = channels // self.groups % 8 == 0
        return channels_last and divides and sum(self.reach(channels)) <= 8

    def constants(self, channels: int) -> dict[str, Any]:
        """The kernels' constants."""
        before, after = self.reach(channels)
        group_size = channels // self.groups
        return {"GROUP_SIZE": group_size, "BEFORE": before, "AFTER": after, "BETA": self.beta}


def checked_normalisation(
    shape: Sequence[int],
    size: int,
    alpha: float,
    beta: float,
    k: float,
    alpha_mode: str,
    groups: int,
) -> Normalisation:
    """The arguments of LRN on an input of this shape.

    Raises:
        ValueError, RuntimeError, TypeError: see :func:`local_response_norm`.
    """
    if len(shape) < 3:
        raise ValueError(
            f"Expected 3D or higher dimensionality input (got {len(shape)} dimensions)"
        )
    if not isinstance(size, int):
        raise TypeError(f"size must be an int, got {size!r}")
    if size < 1:
        raise RuntimeError(f"size should be greater than zero, but got {size}")
    if alpha_mode not in ("mean", "sum"):
        raise ValueError(f"alpha_mode must be 'mean' or 'sum', got {alpha_mode!r}")
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"groups must divide the {shape[1]} channels, got groups={groups}")
    scale = alpha / size if alpha_mode == "mean" else alpha
    return Normalisation(size, scale, beta, k, groups)


def normalise(input: Tensor, *numbers: Any) -> Tensor:
    """The forward pass; ``numbers`` are those of :class:`Normalisation`."""
    input = dense(input)
    output = empty(input.shape, input, channels_last=is_channels_last(input))
    _launch(device_code("lrn").lrn_forward, (input, output), input, Normalisation(*numbers))
    return output


def _normalise_backward(output_grad: Tensor, input: Tensor, *numbers: Any) -> Tensor:
    input = dense(input)
    channels_last = is_channels_last(input)
    output_grad = dense_as(output_grad, channels_last)
    input_grad = empty(input.shape, input, channels_last=channels_last)
    tensors = (output_grad, input, input_grad)
    _launch(device_code("lrn").lrn_backward, tensors, input, Normalisation(*numbers))
    return input_grad


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], input: Tensor, normalisation: Normalisation
) -> None:
    outer, channels, inner = outer_channels_inner(input)
    groups = normalisation.groups
    rows = outer * groups * -(-channels // groups // 8) * inner
    blocks = config.pointwise(input, 8, count=8 * rows)
    launch(
        kernel,
        blocks.programs(8 * rows),
        *tensors,
        rows,
        inner,
        normalisation.scale,
        normalisation.k,
        **normalisation.constants(channels),
        BLOCK=blocks.block,
        PACKED=normalisation.packed(channels, is_channels_last(input)),
        num_warps=blocks.num_warps,
    )


def _save(context: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    input, *context.numbers = arguments
    context.save_for_backward(input)


def _input_grad(context: Any, output_grad: Tensor) -> tuple[Tensor]:
    (input,) = context.saved_tensors
    return (_backward(output_grad, input, *context.numbers),)


# of an operator, in the order of :class:`Normalisation`
NORMALISATION = "SymInt size, float scale, float beta, float k, SymInt groups"
_backward = Operator(
    f"local_response_norm_backward(Tensor output_grad, Tensor input, {NORMALISATION}) -> Tensor",
    _normalise_backward,
    fake=lambda output_grad, input, *numbers: like(input),
)
_forward = Operator(
    f"local_response_norm(Tensor input, {NORMALISATION}) -> Tensor",
    normalise,
    fake=lambda input, *numbers: like(input),
    save=_save,
    backward=_input_grad,
)
