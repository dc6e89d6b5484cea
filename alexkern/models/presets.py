"""The presets: every number in which one AlexNet differs from another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class ResponseNorm:
    """Constants of local response normalisation, as in ``ops.local_response_norm``."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0
    alpha_mode: Literal["sum", "mean"] = "sum"
    groups: int = 1


class Packing(NamedTuple):
    """The arguments of ``ops.augment`` that make a network's packed input."""

    padding: tuple[int, int, int, int]
    space_to_depth: int


@dataclass(frozen=True)
class Preset:
    """One AlexNet. The defaults are the paper's text (Krizhevsky et al. 2012).

    Attributes:
        name: What ``--preset`` and :func:`get_preset` call it.
        widths: Output channels of conv1 to conv5, both columns together (section 3.5).
        groups: Groups of conv1 to conv5: 2 where a column sees only its own maps.
        conv1_kernel, conv1_stride: Of the first convolution; the others have kernels 5, 3, 3, 3
            and stride 1.
        conv1_padding: (left, right, top, bottom).
        response_norm: The normalisation of layers 1 and 2, None for none.
        spatial_norm: A second normalisation over 5x5 pixels after layer 2's (2012 code).
        relu_after_pool1: Layer 1 is conv, norm, pool, ReLU instead of conv, ReLU, norm, pool.
        ceil_mode: Output sizes of pooling are rounded up.
        fc_width: Units of fc6 and of fc7.
        dropout: Probability p of dropping a unit.
        dropout_mode: ``"paper"`` (kept units unscaled, times 1 - p at test) or ``"inverted"``.
        dropout_before: Dropout stands before fc6 and fc7 instead of after them.
        weight_std: Standard deviation of the normal initialisation of the eight weights,
            None for PyTorch's default initialisation of weights and biases.
        bias: Initial values of the eight biases.
        stored_size, crop_size: Side in pixels of a stored image and of what the network sees.
        input_std: Divides the centred pixels, in grey levels; 1 leaves them as they are.
        learning_rate, batch_size, epochs: Defaults of training.
        colour_noise: Likewise; see ``alexkern.data.Colours.noise``.
    """

    name: str = "paper"
    widths: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256)
    groups: tuple[int, int, int, int, int] = (1, 2, 1, 2, 2)
    conv1_kernel: int = 11
    conv1_stride: int = 4
    # 224 pixels give 55 outputs only with three more on the right and the bottom: the 2012 code
    # rounds sizes up and lets the last window hang over.
    conv1_padding: tuple[int, int, int, int] = (0, 3, 0, 3)
    response_norm: ResponseNorm | None = ResponseNorm()
    spatial_norm: bool = False
    relu_after_pool1: bool = False
    ceil_mode: bool = False
    fc_width: int = 4096
    dropout: float = 0.5
    dropout_mode: Literal["paper", "inverted"] = "paper"
    dropout_before: bool = False
    weight_std: tuple[float, ...] | None = (0.01,) * 8
    bias: tuple[float, ...] = (0, 1, 0, 1, 1, 1, 1, 0)
    stored_size: int = 256
    crop_size: int = 224
    input_std: float = 1.0
    learning_rate: float = 0.01
    batch_size: int = 128
    epochs: int = 90
    colour_noise: str = "stdev"

    @property
    def packing(self) -> Packing | None:
        """How to pack the input, so that conv1 has stride 1, a smaller kernel and no padding.

        Blocks of stride x stride pixels become one, with as many times the channels. The kernel
        covers whole blocks then, and padding on the right and below is what they need. None
        where the stride is 1, or where conv1 reads less than the image that it is given.
        """
        left, right, top, bottom = self.conv1_padding
        right, bottom = self._padding_behind(left, right), self._padding_behind(top, bottom)
        if self.conv1_stride == 1 or min(right, bottom) < 0:
            return None
        return Packing((left, right, top, bottom), self.conv1_stride)

    def _padding_behind(self, before: int, behind: int) -> int:
        """What the packed input needs instead of conv1's, along one side."""
        pixels, stride = before + self.crop_size, self.conv1_stride
        outputs = (pixels + behind - self.conv1_kernel) // stride + 1
        taps = -(-self.conv1_kernel // stride)
        return (outputs - 1 + taps) * stride - pixels


_PAPER = Preset()

# The network of the author's 2012 source, which is not quite the one of the text.
_KRIZHEVSKY2012 = replace(
    _PAPER,
    name="krizhevsky2012",
    response_norm=ResponseNorm(alpha_mode="mean", groups=2),
    spatial_norm=True,
    relu_after_pool1=True,
    ceil_mode=True,
    weight_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
)

# Half the kernels in conv1 to conv4, the same number in conv5 and full-size fc layers
# (paper, footnote 2).
_ONE_GPU = replace(_PAPER, name="one_gpu", widths=(48, 128, 192, 192, 256), groups=(1,) * 5)

# torchvision's `alexnet`, after "One weird trick for parallelizing convolutional neural networks".
_OWT = replace(
    _PAPER,
    name="owt",
    widths=(64, 192, 384, 256, 256),
    groups=(1,) * 5,
    conv1_padding=(2, 2, 2, 2),
    response_norm=None,
    dropout_mode="inverted",
    dropout_before=True,
    weight_std=None,
    colour_noise="none",
    input_std=57.6,  # torchvision's mean over the channels: 255 * (0.229 + 0.224 + 0.225) / 3
)

# The paper's topology for images of about 32 pixels: 32 -> 15 -> 7 -> 3 -> 1 is exact, as
# 224 -> 55 -> 27 -> 13 -> 6 is. With the paper's constants a net this narrow stays at chance for
# hundreds of steps. It starts at once with weights of std sqrt(2 / fan in) (He et al. 2015),
# biases of 0, less dropout, and a normalisation that fits activations of about 1. Taps times
# channels stay just below powers of two (75, 250, 500, 252), which tiles of kernels are.
_MINI_FAN_IN = (75, 250, 360, 252, 252, 56, 512, 512)
_MINI = replace(
    _PAPER,
    name="mini",
    widths=(20, 40, 56, 56, 56),
    conv1_kernel=5,
    conv1_stride=2,
    conv1_padding=(0, 1, 0, 1),
    response_norm=ResponseNorm(alpha=0.1, k=1.0),
    fc_width=512,
    dropout=0.1,
    weight_std=tuple(math.sqrt(2 / fan_in) for fan_in in _MINI_FAN_IN),
    bias=(0,) * 8,
    stored_size=36,
    crop_size=32,
    input_std=64.0,
    learning_rate=0.01,
    batch_size=32,
    epochs=30,
    colour_noise="none",
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {preset.name: preset for preset in (_PAPER, _KRIZHEVSKY2012, _ONE_GPU, _OWT, _MINI)}
)
"""All presets by name."""


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: There is none; the message lists the names.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
