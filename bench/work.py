"""The least work that each operation needs: the one table of FLOPs and bytes.

Every input is read once and every result is written once, in the operation's dtype; what a
backward needs is written by forward and read by backward. FLOPs are those of matrix products (two
per multiply and add), zeros of the padding included; the rest never limits a GPU.
"""

from dataclasses import dataclass
from math import prod

from bench.layers import CONVOLUTIONS, FULLY_CONNECTED, NORMALISED, POOLS, Convolution, Shape
from bench.record import Ceilings


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, and bytes that cross the device memory's bus."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_seconds(self, ceilings: Ceilings, dtype: str) -> float:
        """The time that no implementation can beat on a machine with these limits."""
        matmul = self.flops / ceilings.matmul_flops_per_second[dtype]
        return max(matmul, self.bytes / ceilings.copy_bytes_per_second)


def convolution(
    layer: Convolution, direction: str, batch: int, itemsize: int, masked: bool = True
) -> Work:
    """Convolution, bias and ReLU. ``backward`` is both gradients.

    The image's gradient is not needed by the first layer, which has 3 channels. ``masked``:
    backward reads the output for the ReLU's mask.
    """
    out, products = layer.channels, layer.group_in * layer.kernel**2
    x, y = batch * prod(layer.shape), batch * out * prod(layer.output_size)
    weight, flops = out * products, 2 * y * products
    elements = {
        "forward": x + weight + out + y,
        "input_grad": y + weight + x,
        "weight_grad": y + x + weight,
    }
    if direction != "backward":
        return Work(flops, elements[direction] * itemsize)
    needs_input = layer.shape[0] > 3
    read, written = (1 + masked) * y + x + weight * needs_input, x * needs_input + weight + out
    return Work(flops * (1 + needs_input), (read + written) * itemsize)


def normalisation(shape: Shape, direction: str, batch: int, itemsize: int) -> Work:
    """Reads x, writes y; backward reads x and the gradient, writes one."""
    return Work(0, {"forward": 2, "backward": 3}[direction] * batch * prod(shape) * itemsize)


def pooling(shape: Shape, batch: int, itemsize: int, training: bool = True) -> Work:
    """3x3 with stride 2; in training one byte per output tells which tap won. Equal both ways."""
    x, y = batch * prod(shape), batch * prod(pooled(shape))
    return Work(0, (x + y) * itemsize + y * training)


def normalisation_pooling(
    shape: Shape, direction: str, batch: int, itemsize: int, training: bool = True
) -> Work:
    """Both in one pass: what lies between them never reaches memory; backward reads x again."""
    again = batch * prod(shape) * itemsize * (direction == "backward")
    return pooling(shape, batch, itemsize, training) + Work(0, again)


def augmentation(
    crop: tuple[int, int],
    batch: int,
    itemsize: int,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Work:
    """Reads each crop's bytes and the float32 mean, writes the crops in the network's dtype.

    Besides, of each image: its corner (int64), flip and float32 shift of the colours. Padding is
    written, too.
    """
    left, right, top, bottom = padding
    values, written = 3 * prod(crop), 3 * (top + crop[0] + bottom) * (left + crop[1] + right)
    per_image = values + written * itemsize + 2 * 8 + 1 + 3 * 4
    return Work(0, batch * per_image + 4 * values)


def convolution_normalisation_pooling(
    layer: Convolution, direction: str, batch: int, itemsize: int
) -> Work:
    """A whole layer; what the normalisation reads again in backward is the ReLU's mask, too."""
    shape = (layer.channels, *layer.output_size)
    tail = normalisation_pooling(shape, direction, batch, itemsize)
    return convolution(layer, direction, batch, itemsize, masked=False) + tail


def pointwise(count: int, itemsize: int) -> Work:
    """One read and one write of each element."""
    return Work(0, 2 * count * itemsize)


def update(count: int, itemsize: int) -> Work:
    """One step of SGD with momentum on ``count`` parameters; the gradient has their dtype.

    Weight and velocity are float32, read and written; parameters in half precision are written
    besides, as a copy.
    """
    copied = itemsize < 4
    return Work(0, count * (2 * 4 + 2 * 4 + itemsize + itemsize * copied))


def linear(layer: tuple[int, int], batch: int, itemsize: int) -> Work:
    """One matrix product of a fully connected layer; forward and both gradients are equal."""
    inputs, outputs = layer
    elements = batch * inputs + inputs * outputs + batch * outputs
    return Work(2 * batch * inputs * outputs, elements * itemsize)


def fully_connected(layer: tuple[int, int], direction: str, batch: int, itemsize: int) -> Work:
    """A linear layer with bias, ReLU and dropout; backward is the gradients of all operands.

    Forward writes the output only, which tells backward what was dropped.
    """
    inputs, outputs = layer
    product, bias = linear(layer, batch, itemsize), Work(0, outputs * itemsize)
    if direction == "forward":
        return product + bias
    output_again = Work(0, batch * outputs * itemsize)
    operands_again = Work(0, (batch + outputs) * inputs * itemsize)  # read; and their gradients
    return Work(2 * product.flops, product.bytes) + output_again + operands_again + bias


def pooled(shape: Shape) -> Shape:
    """[C, H, W] after 3x3 pooling with stride 2."""
    channels, height, width = shape
    return channels, (height - 3) // 2 + 1, (width - 3) // 2 + 1


def network(batch: int, itemsize: int, *, training: bool, response_norm: bool) -> list[Work]:
    """The parts of the paper's network, fused as far as they can be; the floor is their sum.

    Convolutions carry bias and ReLU, pooling carries the normalisation before it. Training adds
    the backward parts and the optimizer, whose gradients have the network's dtype.
    """
    parts = [augmentation(CONVOLUTIONS["conv1"].shape[1:], batch, itemsize)]
    for direction in ("forward", "backward") if training else ("forward",):
        parts += features(
            direction, batch, itemsize, training=training, response_norm=response_norm
        )
        parts += classifier(direction, batch, itemsize)
    if training:
        parts.append(update(parameters(), itemsize))
    return parts


def features(
    direction: str,
    batch: int,
    itemsize: int,
    *,
    columns: int = 1,
    training: bool = True,
    response_norm: bool = True,
) -> list[Work]:
    """The parts of the paper's network up to fc6, or those of one of its columns."""
    parts = []
    for name, layer in CONVOLUTIONS.items():
        normalised = response_norm and name.removeprefix("conv") in NORMALISED
        own = _column(layer, columns)
        parts.append(convolution(own, direction, batch, itemsize, masked=not normalised))
    for number, (channels, height, width) in POOLS.items():
        shape = (channels // columns, height, width)
        if response_norm and number in NORMALISED:
            parts.append(normalisation_pooling(shape, direction, batch, itemsize, training))
        else:
            parts.append(pooling(shape, batch, itemsize, training))
    return parts


def _column(layer: Convolution, columns: int) -> Convolution:
    """What one of the columns computes of a layer, which sees all maps where it has one group."""
    (channels, height, width), groups = layer.shape, layer.groups
    if groups > 1:
        channels, groups = channels // columns, groups // columns
    shape = (channels, height, width)
    return layer._replace(shape=shape, channels=layer.channels // columns, groups=groups)


def classifier(direction: str, batch: int, itemsize: int, *, columns: int = 1) -> list[Work]:
    """The parts of the paper's network from fc6 on; of several columns the first, which has fc8."""
    products = 1 if direction == "forward" else 2
    layers = [
        (inputs, outputs if name == "fc8" else outputs // columns)
        for name, (inputs, outputs) in FULLY_CONNECTED.items()
    ]
    return [linear(layer, batch, itemsize) for layer in layers] * products


def fan_in() -> list[int]:
    """Inputs of a unit in each of the paper's eight layers."""
    convolutions = [c.group_in * c.kernel**2 for c in CONVOLUTIONS.values()]
    return convolutions + [inputs for inputs, _ in FULLY_CONNECTED.values()]


def parameters() -> int:
    """Weights and biases of the paper's network."""
    units = [c.channels for c in CONVOLUTIONS.values()]
    units += [outputs for _, outputs in FULLY_CONNECTED.values()]
    return sum(out * (inputs + 1) for out, inputs in zip(units, fan_in(), strict=True))
