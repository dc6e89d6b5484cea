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


Step = Literal["relu", "norm", "spatial_norm", "pool"]
"""What may follow a convolution; ``spatial_norm`` is the 2012 code's over 5x5 pixels."""


class Convolution(NamedTuple):
    """One of a network's convolutions."""

    name: str
    width: int
    kernel: int
    stride: int
    padding: int | tuple[int, int, int, int]
    groups: int
    steps: tuple[Step, ...]

    def output_size(self, size: int) -> int:
        """Side of its maps before the steps, from that of its input."""
        padding = self.padding
        both = 2 * padding if isinstance(padding, int) else padding[0] + padding[1]
        return (size + both - self.kernel) // self.stride + 1


class Packing(NamedTuple):
    """The arguments of ``ops.augment`` that make a network's packed input."""

    padding: tuple[int, int, int, int]
    space_to_depth: int


@dataclass(frozen=True)
class Preset:
    """One AlexNet. The defaults are the paper's text (Krizhevsky et al. 2012).

    Attributes:
        name: What ``--preset`` and :func:`get_preset` call it.
        widths: Output channels of conv1, conv2 and so on, both columns together (section 3.5);
            0 where the network lacks the layer.
        groups: Groups of each convolution: 2 where a column sees only its own maps.
        conv1_kernel, conv1_stride: Of the first convolution; the others have kernels 5, 3, 3, ...
            and stride 1.
        conv1_padding: (left, right, top, bottom).
        padding: Of conv2 and those that follow.
        steps: What follows each convolution, in this order.
        response_norm: The constants of the step ``"norm"``, None to leave it out.
        pool_kernel: Side of a pooling window; windows are 2 pixels apart.
        ceil_mode: Output sizes of pooling are rounded up.
        fc_widths: Units of fc6 and of fc7, both columns together.
        fc_groups: Groups of fc6 and of fc7: 2 where a column sees only its own units.
        dropout: Probability p of dropping a unit.
        dropout_mode: ``"paper"`` (kept units unscaled, times 1 - p at test) or ``"inverted"``.
        dropout_before: Dropout stands before fc6 and fc7 instead of after them.
        weight_std: Standard deviation of the normal initialisation of each convolution's and of
            fc6's to fc8's weight, None for PyTorch's default initialisation of weights and biases.
        bias: Initial values of the same layers' biases.
        stored_size, crop_size: Side in pixels of a stored image and of what the network sees.
        input_std: Divides the centred pixels, in grey levels; 1 leaves them as they are.
        learning_rate, batch_size, epochs: Defaults of training.
        colour_noise: Likewise; see ``alexkern.data.Colours.noise``.
    """

    name: str = "paper"
    widths: tuple[int, ...] = (96, 256, 384, 384, 256)
    groups: tuple[int, ...] = (1, 2, 1, 2, 2)
    conv1_kernel: int = 11
    conv1_stride: int = 4
    # 224 pixels give 55 outputs only with three more on the right and the bottom: the 2012 code
    # rounds sizes up and lets the last window hang over.
    conv1_padding: tuple[int, int, int, int] = (0, 3, 0, 3)
    padding: tuple[int, ...] = (2, 1, 1, 1)
    steps: tuple[tuple[Step, ...], ...] = (
        ("relu", "norm", "pool"),
        ("relu", "norm", "pool"),
        ("relu",),
        ("relu",),
        ("relu", "pool"),
    )
    response_norm: ResponseNorm | None = ResponseNorm()
    pool_kernel: int = 3
    ceil_mode: bool = False
    fc_widths: tuple[int, int] = (4096, 4096)
    fc_groups: tuple[int, int] = (1, 1)
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
    def convolutions(self) -> tuple[Convolution, ...]:
        """Those that the network has, first to last."""
        rows = zip(
            (f"conv{number}" for number in range(1, len(self.widths) + 1)),
            self.widths,
            (self.conv1_kernel, 5, *(3 for _ in self.widths[2:])),
            (self.conv1_stride, *(1 for _ in self.widths[1:])),
            (self.conv1_padding, *self.padding),
            self.groups,
            self.steps,
            strict=True,
        )
        return tuple(layer for layer in map(Convolution._make, rows) if layer.width)

    @property
    def final_size(self) -> int:
        """Side of the maps that fc6 sees."""
        size = self.crop_size
        for layer in self.convolutions:
            size = layer.output_size(size)
            if "pool" in layer.steps:
                size = self.pooled_size(size)
        return size

    def pooled_size(self, size: int) -> int:
        """Side of a map after pooling, from that before."""
        return (size - self.pool_kernel + self.ceil_mode) // 2 + 1

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

# The network of the author's 2012 source, which is not quite the one of the text (layers-145).
_KRIZHEVSKY2012 = replace(
    _PAPER,
    name="krizhevsky2012",
    steps=(
        ("norm", "pool", "relu"),
        ("relu", "norm", "spatial_norm", "pool"),
        ("relu",),
        ("relu",),
        ("relu", "pool"),
    ),
    response_norm=ResponseNorm(alpha_mode="mean", groups=2),
    ceil_mode=True,
    weight_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
)

# The networks that the paper compares with, as the 2012 source has them: each is the one above but
# for one thing. layers-148 leaves out every normalisation, the one over pixels included.
_NO_LRN = replace(_KRIZHEVSKY2012, name="no_lrn", steps=_PAPER.steps, response_norm=None)

# layers-167 leaves out both of layer 2's alone. Not in the paper.
_NO_LRN2 = replace(
    _KRIZHEVSKY2012,
    name="no_lrn2",
    steps=(_KRIZHEVSKY2012.steps[0], ("relu", "pool"), *_KRIZHEVSKY2012.steps[2:]),
)

# layers-147: windows of 2 pixels would make the maps larger, which less padding undoes:
# 55, 28, 26, 13, 13, 13, 11, 6.
_NO_OVERLAP = replace(_KRIZHEVSKY2012, name="no_overlap", pool_kernel=2, padding=(1, 1, 1, 0))

# layers-146: a sixth convolution over the last pooling (section 6), which sees both columns.
_CONV6 = replace(
    _KRIZHEVSKY2012,
    name="conv6",
    widths=(*_KRIZHEVSKY2012.widths, 256),
    groups=(*_KRIZHEVSKY2012.groups, 1),
    padding=(*_KRIZHEVSKY2012.padding, 1),
    steps=(*_KRIZHEVSKY2012.steps, ("relu",)),
    weight_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
    bias=(0, 1, 0, 1, 1, 1, 1, 1, 0),
)

# A middle layer removed (section 7). The source has no such network: this is one reading of the
# text. What takes conv3's place sees both columns, as conv3 did.
_MINUS_CONV3 = replace(
    _KRIZHEVSKY2012, name="minus_conv3", widths=(96, 256, 0, 384, 256), groups=(1, 2, 1, 1, 2)
)
_MINUS_CONV4 = replace(_KRIZHEVSKY2012, name="minus_conv4", widths=(96, 256, 384, 0, 256))

# Where the columns see each other's maps, which the paper leaves to cross-validation (section
# 3.2). Nowhere before fc8: layers-150, whose conv2 and fc6 are wider to make up for it.
_NO_EXCHANGE = replace(
    _KRIZHEVSKY2012,
    name="no_exchange",
    widths=(96, 320, 384, 384, 256),
    groups=(1, 2, 2, 2, 2),
    fc_widths=(8192, 4096),
    fc_groups=(2, 2),
)
# In conv4 instead of conv3, and in every layer: these have no run in the source.
_EXCHANGE_CONV4 = replace(_KRIZHEVSKY2012, name="exchange_conv4", groups=(1, 2, 2, 1, 2))
_EXCHANGE_ALL = replace(_KRIZHEVSKY2012, name="exchange_all", groups=(1,) * 5)

# Half the kernels in conv1 to conv4, the same number in conv5 and full-size fc layers
# (paper, footnote 2).
_ONE_GPU = replace(_PAPER, name="one_gpu", widths=(48, 128, 192, 192, 256), groups=(1,) * 5)

# The same with the 2012 source's details, as it was run (layers-145-half).
_ONE_GPU_2012 = replace(
    _KRIZHEVSKY2012,
    name="one_gpu_2012",
    widths=_ONE_GPU.widths,
    groups=_ONE_GPU.groups,
    response_norm=ResponseNorm(alpha_mode="mean"),
)

# The same author's next code, cuda-convnet2 (layers-223-1gpu): one column of other widths, without
# the normalisation over pixels. Equal biases in fc8, as the -7 are, do not change probabilities.
_CUDA_CONVNET2 = replace(
    _KRIZHEVSKY2012,
    name="cuda_convnet2",
    widths=(64, 192, 384, 256, 256),
    groups=(1,) * 5,
    steps=(_KRIZHEVSKY2012.steps[0], ("relu", "norm", "pool"), *_KRIZHEVSKY2012.steps[2:]),
    response_norm=ResponseNorm(alpha_mode="mean"),
    bias=(0, 1, 0, 1, 1, 1, 1, -7),
)

# Caffe's bvlc_alexnet (train_val.prototxt and solver.prototxt): 227 pixels need no padding. Its
# readme: the training loss stayed flat with biases of 1.
_CAFFE_ALEXNET = replace(
    _PAPER,
    name="caffe_alexnet",
    conv1_padding=(0, 0, 0, 0),
    response_norm=ResponseNorm(k=1.0, alpha_mode="mean"),
    ceil_mode=True,
    dropout_mode="inverted",
    weight_std=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
    bias=(0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0),
    crop_size=227,
    batch_size=256,
    colour_noise="none",
)

# Caffe's bvlc_reference_caffenet: pools before it normalises, and keeps the paper's biases.
_CAFFENET = replace(
    _CAFFE_ALEXNET,
    name="caffenet",
    steps=(
        ("relu", "pool", "norm"),
        ("relu", "pool", "norm"),
        ("relu",),
        ("relu",),
        ("relu", "pool"),
    ),
    bias=_PAPER.bias,
)

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
    fc_widths=(512, 512),
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
    {
        preset.name: preset
        for preset in (
            *(_PAPER, _KRIZHEVSKY2012, _ONE_GPU, _ONE_GPU_2012),
            *(_NO_LRN, _NO_LRN2, _NO_OVERLAP, _CONV6, _MINUS_CONV3, _MINUS_CONV4),
            *(_NO_EXCHANGE, _EXCHANGE_CONV4, _EXCHANGE_ALL),
            *(_CUDA_CONVNET2, _CAFFE_ALEXNET, _CAFFENET, _OWT, _MINI),
        )
    }
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
