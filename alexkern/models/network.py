"""AlexNet on this project's ops."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexkern.ops as ops
from alexkern.models.presets import Convolution, Preset, Step, get_preset
from alexkern.ops.dropout import draw_seed

# torchvision's names of the same parameters.
TORCHVISION_NAMES = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}


def alexnet(preset: str = "paper", num_classes: int = 1000) -> "AlexNet":
    """A freshly initialised AlexNet; ``torch.manual_seed`` reproduces its weights.

    Args:
        preset: A name in ``PRESETS``.
        num_classes: Number of outputs.

    Raises:
        ValueError: Unknown preset, or fewer than one class.
    """
    return AlexNet(get_preset(preset), num_classes)


class AlexNet(nn.Module):
    """Five convolutions and three fully connected layers (paper section 3.5, figure 2).

    The layers ``conv1`` to ``conv5`` and ``fc6`` to ``fc8`` hold the parameters; what is computed
    with them follows the preset, which may also lack a convolution or have a ``conv6``. A fully
    connected layer of groups has the weight [units, inputs / groups], as a convolution has.

    Args:
        preset: The network's numbers.
        num_classes: Number of outputs.

    Raises:
        ValueError: Fewer than one class.
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    conv4: nn.Conv2d
    conv5: nn.Conv2d

    def __init__(self, preset: Preset, num_classes: int = 1000) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.preset = preset
        self.num_classes = num_classes
        self._convolutions = preset.convolutions
        channels = 3
        for name, width, kernel, stride, padding, groups, _ in self._convolutions:
            # conv1's padding has four numbers, which nn.Conv2d cannot hold: forward adds it
            own = padding if isinstance(padding, int) else 0
            layer = nn.Conv2d(channels, width, kernel, stride, own, groups=groups)
            self.add_module(name, layer)
            channels = width
        inputs, (width6, width7) = channels * preset.final_size**2, preset.fc_widths
        self.fc6 = nn.Linear(inputs // preset.fc_groups[0], width6)
        self.fc7 = nn.Linear(width6 // preset.fc_groups[1], width7)
        self.fc8 = nn.Linear(width7, num_classes)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_rename_torchvision_keys)

    def reset_parameters(self) -> None:
        """Draw the weights and set the biases as the preset says (paper section 5)."""
        preset = self.preset
        layers: dict[str, Any] = dict(self.named_children())
        if preset.weight_std is None:
            for layer in layers.values():
                layer.reset_parameters()
            return
        convolutions = (f"conv{number}" for number in range(1, len(preset.widths) + 1))
        names = (*convolutions, "fc6", "fc7", "fc8")
        for name, std, bias in zip(names, preset.weight_std, preset.bias, strict=True):
            if name in layers:
                nn.init.normal_(layers[name].weight, std=std)
                nn.init.constant_(layers[name].bias, bias)

    def forward(self, input: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Class scores.

        Args:
            input: Floating-point [batch, 3, crop_size, crop_size]; any memory format. Or the same
                packed as ``preset.packing`` says, which ``ops.augment`` can write.
            dropout_seeds: int64 [2] on the input's device, one seed per dropout layer. None:
                the op draws them from torch's generator.

        Returns:
            Logits, [batch, num_classes].

        Raises:
            ValueError: ``input`` or ``dropout_seeds`` has another shape.
        """
        _check_shapes(self.preset, input, dropout_seeds)
        x = input
        for layer in self._convolutions:
            x = self._convolve(layer, x)
        x = x.flatten(1)
        for index, fc in enumerate((self.fc6, self.fc7)):
            seed = None if dropout_seeds is None else dropout_seeds[index]
            x = self._connect(fc, self.preset.fc_groups[index], x, seed)
        logits: Tensor = self.fc8(x)
        return logits

    def _convolve(self, layer: Convolution, x: Tensor) -> Tensor:
        """A convolution with what follows it."""
        preset, norm, steps = self.preset, self.preset.response_norm, layer.steps
        operands = _operands(getattr(self, layer.name), x, layer.padding)
        if norm is not None and steps == ("relu", "norm", "pool"):
            return ops.conv2d_bias_relu_lrn_max_pool2d(
                x,
                **operands,
                size=norm.size,
                alpha=norm.alpha,
                beta=norm.beta,
                k=norm.k,
                alpha_mode=norm.alpha_mode,
                norm_groups=norm.groups,
                kernel_size=preset.pool_kernel,
                pool_stride=2,
                ceil_mode=preset.ceil_mode,
            )
        relu_first = steps[:1] == ("relu",)
        x = ops.conv2d_bias_relu(x, **operands, activation="relu" if relu_first else "none")
        functions: dict[Step, Callable[[Tensor], Tensor]] = {
            "relu": torch.relu,
            "norm": self._normalise,
            "spatial_norm": spatial_response_norm,
            "pool": self._pool,
        }
        for step in steps[relu_first:]:
            x = functions[step](x)
        return x

    def _normalise(self, x: Tensor) -> Tensor:
        norm = self.preset.response_norm
        if norm is None:
            return x
        return ops.local_response_norm(
            x, norm.size, norm.alpha, norm.beta, norm.k, norm.alpha_mode, norm.groups
        )

    def _pool(self, x: Tensor) -> Tensor:
        """Max-pooling, overlapping where the kernel is 3 (paper section 3.4)."""
        preset = self.preset
        output = ops.max_pool2d(x, preset.pool_kernel, 2, ceil_mode=preset.ceil_mode)
        assert isinstance(output, Tensor)  # a pair only if indices are asked for
        return output

    def _connect(self, layer: nn.Linear, groups: int, x: Tensor, seed: Tensor | None) -> Tensor:
        """A hidden layer with its dropout (paper section 4.2)."""
        preset = self.preset
        p, mode = preset.dropout, preset.dropout_mode
        if preset.dropout_before:
            x, p = ops.dropout(x, p, self.training, mode=mode, seed=seed), 0.0
        if groups > 1 and seed is None and self.training and p:
            seed = draw_seed(x.device)  # one mask over all groups
        connect = partial(
            ops.linear_bias_relu_dropout, p=p, training=self.training, mode=mode, seed=seed
        )
        if groups == 1:
            return connect(x, layer.weight, layer.bias)
        units = layer.out_features // groups
        columns = zip(
            x.chunk(groups, 1), layer.weight.chunk(groups), layer.bias.chunk(groups), strict=True
        )
        return torch.cat(
            [
                connect(*operands, index_offset=column * units, row_stride=layer.out_features)
                for column, operands in enumerate(columns)
            ],
            1,
        )


def _operands(
    layer: nn.Conv2d, x: Tensor, padding: int | tuple[int, int, int, int]
) -> dict[str, Any]:
    """Of a convolution, besides its input: where that is packed, so is the weight."""
    stride: int | tuple[int, ...] = layer.stride
    weight: Tensor = layer.weight
    if x.shape[1] > layer.in_channels:
        side = layer.stride[0]
        behind = -weight.shape[2] % side
        weight = F.pixel_unshuffle(F.pad(weight, (0, behind, 0, behind)), side)
        stride, padding = 1, 0  # the input's padding is packed with it
    return {
        "weight": weight,
        "bias": layer.bias,
        "stride": stride,
        "padding": padding,
        "groups": layer.groups,
    }


def spatial_response_norm(x: Tensor) -> Tensor:
    """``x * (1 + 0.001 * mean of x**2 over 5x5 pixels of the same map)**-0.75``.

    The second normalisation in layer 2 of the 2012 code. Pixels outside the image count as 0,
    and the mean always divides by 25.
    """
    mean_square = F.avg_pool2d(x * x, 5, stride=1, padding=2, count_include_pad=True)
    return x * (1 + 0.001 * mean_square) ** -0.75


def _check_shapes(preset: Preset, input: Tensor, dropout_seeds: Tensor | None) -> None:
    shapes = _image_shapes(preset)
    if input.dim() != 4 or list(input.shape[1:]) not in shapes:
        accepted = ", or packed ".join(f"[batch, {', '.join(map(str, each))}]" for each in shapes)
        raise ValueError(
            f"preset {preset.name!r} takes images of shape {accepted}, got {list(input.shape)}"
        )
    if dropout_seeds is not None and dropout_seeds.shape != (2,):
        raise ValueError(
            f"dropout_seeds must have shape [2] (one per dropout layer), "
            f"got {list(dropout_seeds.shape)}"
        )


def _image_shapes(preset: Preset) -> list[list[int]]:
    """Of an image as it is, and packed, if it can be."""
    size, packing = preset.crop_size, preset.packing
    if packing is None:
        return [[3, size, size]]
    (left, right, top, bottom), side = packing
    packed = [3 * side**2, (top + size + bottom) // side, (left + size + right) // side]
    return [[3, size, size], packed]


def renamed(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict of this network, whether it has its names or torchvision's."""
    ours = {
        f"{prefix}{there}.{kind}": f"{prefix}{here}.{kind}"
        for there, here in TORCHVISION_NAMES.items()
        for kind in ("weight", "bias")
    }
    return {ours.get(name, name): tensor for name, tensor in state.items()}


def _rename_torchvision_keys(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Let ``load_state_dict`` take torchvision's names as well; it wants the same dict changed."""
    ours = renamed(state_dict, prefix)
    state_dict.clear()
    state_dict.update(ours)
