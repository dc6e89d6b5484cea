"""AlexNet on this project's ops."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import alexkern.ops as ops
from alexkern.models.presets import Preset, get_preset

# torchvision's names of the same parameters.
_TORCHVISION_NAMES = {
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
    with them follows the preset.

    Args:
        preset: The network's numbers.
        num_classes: Number of outputs.

    Raises:
        ValueError: Fewer than one class.
    """

    def __init__(self, preset: Preset, num_classes: int = 1000) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.preset = preset
        self.num_classes = num_classes
        widths, groups = preset.widths, preset.groups
        # conv1's padding has four numbers, which nn.Conv2d cannot hold: forward adds it.
        self.conv1 = nn.Conv2d(
            3, widths[0], preset.conv1_kernel, preset.conv1_stride, groups=groups[0]
        )
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5, padding=2, groups=groups[1])
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1, groups=groups[2])
        self.conv4 = nn.Conv2d(widths[2], widths[3], 3, padding=1, groups=groups[3])
        self.conv5 = nn.Conv2d(widths[3], widths[4], 3, padding=1, groups=groups[4])
        self.fc6 = nn.Linear(widths[4] * _pool5_size(preset) ** 2, preset.fc_width)
        self.fc7 = nn.Linear(preset.fc_width, preset.fc_width)
        self.fc8 = nn.Linear(preset.fc_width, num_classes)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_rename_torchvision_keys)

    def reset_parameters(self) -> None:
        """Draw the weights and set the biases as the preset says (paper section 5)."""
        layers = [layer for layer in self.children() if isinstance(layer, nn.Conv2d | nn.Linear)]
        if self.preset.weight_std is None:
            for layer in layers:
                layer.reset_parameters()
            return
        for layer, std, bias in zip(layers, self.preset.weight_std, self.preset.bias, strict=True):
            nn.init.normal_(layer.weight, std=std)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)

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
        preset = self.preset
        _check_shapes(preset, input, dropout_seeds)
        if preset.relu_after_pool1:
            x = self._convolve(self.conv1, input, preset.conv1_padding, activation="none")
            x = self._pool(self._normalise(x)).relu()
        else:
            x = self._convolve_normalise_pool(self.conv1, input, preset.conv1_padding)
        if preset.spatial_norm:
            x = self._normalise(self._convolve(self.conv2, x, 2))
            x = self._pool(spatial_response_norm(x))
        else:
            x = self._convolve_normalise_pool(self.conv2, x, 2)
        x = self._convolve(self.conv3, x, 1)
        x = self._convolve(self.conv4, x, 1)
        x = self._pool(self._convolve(self.conv5, x, 1))
        x = x.flatten(1)
        for index, layer in enumerate((self.fc6, self.fc7)):
            x = self._connect(layer, x, None if dropout_seeds is None else dropout_seeds[index])
        logits: Tensor = self.fc8(x)
        return logits

    def _convolve(
        self,
        layer: nn.Conv2d,
        x: Tensor,
        padding: int | tuple[int, int, int, int],
        activation: str = "relu",
    ) -> Tensor:
        return ops.conv2d_bias_relu(x, **_operands(layer, x, padding), activation=activation)

    def _convolve_normalise_pool(
        self, layer: nn.Conv2d, x: Tensor, padding: int | tuple[int, int, int, int]
    ) -> Tensor:
        norm = self.preset.response_norm
        if norm is None:
            return self._pool(self._convolve(layer, x, padding))
        return ops.conv2d_bias_relu_lrn_max_pool2d(
            x,
            **_operands(layer, x, padding),
            size=norm.size,
            alpha=norm.alpha,
            beta=norm.beta,
            k=norm.k,
            alpha_mode=norm.alpha_mode,
            norm_groups=norm.groups,
            kernel_size=3,
            pool_stride=2,
            ceil_mode=self.preset.ceil_mode,
        )

    def _normalise(self, x: Tensor) -> Tensor:
        norm = self.preset.response_norm
        if norm is None:
            return x
        return ops.local_response_norm(
            x, norm.size, norm.alpha, norm.beta, norm.k, norm.alpha_mode, norm.groups
        )

    def _pool(self, x: Tensor) -> Tensor:
        """Overlapping max-pooling (paper section 3.4)."""
        output = ops.max_pool2d(x, 3, 2, ceil_mode=self.preset.ceil_mode)
        assert isinstance(output, Tensor)  # a pair only if indices are asked for
        return output

    def _connect(self, layer: nn.Linear, x: Tensor, seed: Tensor | None) -> Tensor:
        """A hidden layer with its dropout (paper section 4.2)."""
        preset = self.preset
        p, mode = preset.dropout, preset.dropout_mode
        if preset.dropout_before:
            x, p = ops.dropout(x, p, self.training, mode=mode, seed=seed), 0.0
        return ops.linear_bias_relu_dropout(
            x, layer.weight, layer.bias, p, self.training, mode=mode, seed=seed
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


def _pool5_size(preset: Preset) -> int:
    """Side of pool5's output. All presets' sizes are exact, so floor and ceil agree."""
    padding = preset.conv1_padding[0] + preset.conv1_padding[1]
    size = (preset.crop_size + padding - preset.conv1_kernel) // preset.conv1_stride + 1
    for _ in range(3):
        size = (size - 3) // 2 + 1
    return size


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


def _rename_torchvision_keys(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Let ``load_state_dict`` take torchvision's names as well."""
    for theirs, ours in _TORCHVISION_NAMES.items():
        for kind in ("weight", "bias"):
            if f"{prefix}{theirs}.{kind}" in state_dict:
                state_dict[f"{prefix}{ours}.{kind}"] = state_dict.pop(f"{prefix}{theirs}.{kind}")
