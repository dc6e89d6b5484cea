"""The ops as modules that take the place of ``torch.nn``'s.

Each has the arguments, attributes, ``state_dict`` keys and initialisation of the modules that it
stands for, so that a class name is all that changes in a model, and checkpoints go both ways. What
is this project's own is keyword-only, and is shown only where it differs from its default. What
the ops promise (dtypes, layouts, what is kept for backward) is said in :mod:`alexkern.ops`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexkern import ops

__all__ = [
    "Conv2dBiasReLU",
    "Dropout",
    "LRNMaxPool2d",
    "LinearBiasReLUDropout",
    "LocalResponseNorm",
    "MaxPool2d",
]


class Conv2dBiasReLU(nn.Conv2d):
    """:class:`torch.nn.Conv2d`, then a ReLU: :func:`alexkern.ops.conv2d_bias_relu`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: as
            :class:`torch.nn.Conv2d`.
        padding: as there, or (left, right, top, bottom) in pixels.
        padding_mode: as there; anything but ``"zeros"`` pads in a pass of its own.
        activation: ``"relu"`` or ``"none"``.

    Raises:
        ValueError: what :class:`torch.nn.Conv2d` refuses, or unknown ``activation``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | tuple[int, int, int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
    ) -> None:
        _check_choice("activation", activation, ("relu", "none"))
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            cast(Any, padding),  # torch keeps a tuple of any length
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if isinstance(padding, tuple) and len(padding) == 4:
            # what other modes pad, which torch derives from (height, width)
            self._reversed_padding_repeated_twice = list(padding)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Of [N, in_channels, H, W] or [in_channels, H, W]."""
        padding: Sequence[int] | str = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = (0, 0)
        return ops.conv2d_bias_relu(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.activation,
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows in brackets."""
        return f"{super().extra_repr()}{_changed(self, activation='relu')}"


class _Constants(NamedTuple):
    """Arguments of a normalisation."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    alpha_mode: str = "mean"


# What a system does unless it is told otherwise; where it asks for the size, the paper's. All
# windows are of odd size, on which the systems agree.
_PRESETS = {
    # Krizhevsky et al. 2012, section 3.3: alpha times the sum.
    "paper": _Constants(k=2.0, alpha_mode="sum"),
    # The paper's source code (layers.py divides its scale by the size; minDiv is 2).
    "krizhevsky2012": _Constants(k=2.0),
    # LRNParameter in caffe.proto; lrn_layer.cpp divides. Caffe's AlexNet sets alpha=1e-4, which
    # makes it "pytorch".
    "caffe": _Constants(alpha=1.0),
    # torch.nn.LocalResponseNorm divides.
    "pytorch": _Constants(),
    # tf.nn.local_response_normalization: a depth_radius of 5 to both sides, and no division.
    "tensorflow": _Constants(size=2 * 5 + 1, alpha=1.0, beta=0.5, alpha_mode="sum"),
    # cudnnCreateLRNDescriptor; cuDNN divides.
    "cudnn": _Constants(k=2.0),
    # The operator LRN, version 13, divides.
    "onnx": _Constants(),
    # dagnn.LRN: [N KAPPA ALPHA BETA] = [5 1 0.0001/5 0.75]; vl_nnnormalize does not divide.
    "matconvnet": _Constants(alpha=1e-4 / 5, alpha_mode="sum"),
    # chainer.functions.local_response_normalization does not divide.
    "chainer": _Constants(k=2.0, alpha_mode="sum"),
    # mxnet.nd.LRN divides; knorm is 2.
    "mxnet": _Constants(k=2.0),
}


class LocalResponseNorm(nn.LocalResponseNorm):
    """:class:`torch.nn.LocalResponseNorm`: :func:`alexkern.ops.local_response_norm`.

    Args:
        size, alpha, beta, k: as :class:`torch.nn.LocalResponseNorm`.
        alpha_mode: ``"mean"`` divides alpha by size, as PyTorch; ``"sum"`` does not, as the paper.
        groups: number of equal groups of channels whose borders no window crosses.

    Raises:
        ValueError: unknown ``alpha_mode``.
    """

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        alpha_mode: str = "mean",
        groups: int = 1,
    ) -> None:
        _check_choice("alpha_mode", alpha_mode, ("mean", "sum"))
        super().__init__(size, alpha, beta, k)
        self.alpha_mode = alpha_mode
        self.groups = groups

    @classmethod
    def preset(cls, name: str, groups: int = 1) -> Self:
        """The normalisation with a system's own constants.

        Args:
            name: ``"paper"`` (the text), ``"krizhevsky2012"`` (its source code), ``"caffe"``,
                ``"pytorch"``, ``"tensorflow"``, ``"cudnn"``, ``"onnx"``, ``"matconvnet"``,
                ``"chainer"`` or ``"mxnet"``: the system's defaults, in its own reading of them.
                Where it has none for the size, that is 5.
            groups: of channels that are normalised alone, which no system's constants say. The
                2012 code's layers have 2, one per GPU.

        Raises:
            ValueError: another name; the message lists these.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name]._asdict(), groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        """Of [N, C, *]."""
        return ops.local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, self.alpha_mode, self.groups
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows in brackets."""
        return f"{super().extra_repr()}{_changed(self, alpha_mode='mean', groups=1)}"


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d`, with its arguments: :func:`alexkern.ops.max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Of [N, C, H, W] or [C, H, W]; with ``return_indices`` also the maxima's places."""
        return ops.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class LRNMaxPool2d(nn.Module):
    """:class:`LocalResponseNorm`, then :class:`MaxPool2d`: :func:`alexkern.ops.lrn_max_pool2d`.

    Args:
        size, alpha, beta, k, alpha_mode, groups: of :class:`LocalResponseNorm`.
        kernel_size, stride, padding, dilation, ceil_mode: of :class:`MaxPool2d`. There is no
            ``return_indices``: where the maxima's places are wanted, use the two modules.

    Raises:
        ValueError: unknown ``alpha_mode``.
    """

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        ceil_mode: bool = False,
        alpha_mode: str = "mean",
        groups: int = 1,
    ) -> None:
        _check_choice("alpha_mode", alpha_mode, ("mean", "sum"))
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode
        self.alpha_mode = alpha_mode
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        """Of [N, C, H, W] or [C, H, W]."""
        return ops.lrn_max_pool2d(
            input,
            self.size,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            alpha=self.alpha,
            beta=self.beta,
            k=self.k,
            alpha_mode=self.alpha_mode,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows in brackets."""
        return (
            f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
            f"{_changed(self, alpha_mode='mean', groups=1)}"
        )


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout`: :func:`alexkern.ops.dropout`.

    Args:
        p, inplace: as :class:`torch.nn.Dropout`.
        mode: ``"inverted"``, as PyTorch, or ``"paper"``: units are scaled by 1 - p in evaluation
            instead of by 1 / (1 - p) in training.

    Raises:
        ValueError: ``p`` outside [0, 1], or unknown ``mode``.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, mode: str = "inverted") -> None:
        _check_choice("mode", mode, ("inverted", "paper"))
        super().__init__(p, inplace)
        self.mode = mode

    def forward(self, input: Tensor, *, seed: Tensor | None = None) -> Tensor:
        """Of any shape; ``seed`` (int64, one element) fixes the mask."""
        return ops.dropout(input, self.p, self.training, self.inplace, mode=self.mode, seed=seed)

    def extra_repr(self) -> str:
        """What ``repr`` shows in brackets."""
        return f"{super().extra_repr()}{_changed(self, mode='inverted')}"


class LinearBiasReLUDropout(nn.Linear):
    """:class:`torch.nn.Linear`, ReLU, dropout: :func:`alexkern.ops.linear_bias_relu_dropout`.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`.
        p: probability of dropping a unit.
        activation: ``"relu"`` or ``"none"``.
        mode: of :class:`Dropout`.

    Raises:
        ValueError: ``p`` outside [0, 1], or unknown ``activation`` or ``mode``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float = 0.5,
        activation: str = "relu",
        mode: str = "inverted",
    ) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        _check_choice("activation", activation, ("relu", "none"))
        _check_choice("mode", mode, ("inverted", "paper"))
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p = p
        self.activation = activation
        self.mode = mode

    def forward(self, input: Tensor, *, seed: Tensor | None = None) -> Tensor:
        """Of [*, in_features]; ``seed`` (int64, one element) fixes the mask."""
        return ops.linear_bias_relu_dropout(
            input,
            self.weight,
            self.bias,
            self.p,
            self.training,
            self.activation,
            mode=self.mode,
            seed=seed,
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows in brackets."""
        changed = _changed(self, activation="relu", mode="inverted")
        return f"{super().extra_repr()}, p={self.p}{changed}"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _changed(module: nn.Module, **defaults: object) -> str:
    """Attributes that differ from these, as ``extra_repr`` goes on with them."""
    values = {name: getattr(module, name) for name in defaults}
    return "".join(f", {name}={value}" for name, value in values.items() if value != defaults[name])
