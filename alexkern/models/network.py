"""AlexNet on this project's ops."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexkern.ops as ops
from alexkern.models.presets import Convolution, Preset, ResponseNorm, Step, get_preset
from alexkern.ops.dropout import draw_seed
from alexkern.parallel import Axis, Borders, Mesh, gathered, portion, to_first

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

    In several processes each holds one column (paper section 3.2): an equal share of every layer's
    units, that is, of the rows of its weight; fc8 is whole, in the first column alone. A layer of
    one group sees the maps of all columns, for which they are exchanged; one with as many groups
    as there are columns sees those of its own. So does the normalisation, where windows that cross
    a border get the maps that they need. What is computed is the network in one process.

    Args:
        preset: The network's numbers.
        num_classes: Number of outputs.
        mesh: The processes. All columns call the network on the same images, or in a hybrid each
            on its share of the rows, and backward together.
        exchange_dtype: Half precision, to which all that layers of one group see is rounded, and
            its gradient, and in which it travels between columns; None to leave it as it is.

    Raises:
        ValueError: Fewer than one class, or layers that do not divide into the mesh's columns.
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    conv4: nn.Conv2d
    conv5: nn.Conv2d

    def __init__(
        self,
        preset: Preset,
        num_classes: int = 1000,
        mesh: Mesh | None = None,
        exchange_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.preset = preset
        self.num_classes = num_classes
        self._mesh, self._exchange_dtype = mesh or Mesh(), exchange_dtype
        self._columns = self._mesh.columns
        _check_columns(preset, self._mesh)
        # drawn first, so that a seed means the same network in any number of columns
        whole = AlexNet(preset, num_classes) if self._columns.count > 1 else None
        self._convolutions = preset.convolutions
        count = self._mesh.convolution_columns.count
        channels = 3
        for name, width, kernel, stride, padding, groups, _ in self._convolutions:
            # conv1's padding has four numbers, which nn.Conv2d cannot hold: forward adds it
            own = padding if isinstance(padding, int) else 0
            seen, own_groups = _of_column(channels, groups, count)
            layer = nn.Conv2d(seen, width // count, kernel, stride, own, groups=own_groups)
            self.add_module(name, layer)
            channels = width
        count = self._columns.count
        inputs, (width6, width7) = channels * preset.final_size**2, preset.fc_widths
        self.fc6 = nn.Linear(inputs // preset.fc_groups[0], width6 // count)
        self.fc7 = nn.Linear(width6 // preset.fc_groups[1], width7 // count)
        if self._columns.index == 0:
            self.fc8 = nn.Linear(width7, num_classes)
        self.register_load_state_dict_pre_hook(_rename_torchvision_keys)
        if whole is None:
            self.reset_parameters()
        else:
            self.load_state_dict(self.part_of(whole.state_dict()))

    def columns_of(self, name: str) -> Axis:
        """The columns among which a parameter's rows are divided, one after the other."""
        layer = name.partition(".")[0]
        if layer == "fc8":
            return Axis()
        return self._columns if layer.startswith("fc") else self._mesh.convolution_columns

    def part_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this column holds of a whole network's parameters, or of what else has their names.

        Args:
            whole: Tensors by the name of their parameter.
        """
        own = dict(self.named_parameters())
        return {
            name: tensor.chunk(self.columns_of(name).count)[self.columns_of(name).index]
            for name, tensor in whole.items()
            if name in own
        }

    def whole_of(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put together what all columns hold; they call it at the same time.

        Args:
            parts: This column's tensors by the name of their parameter.

        Returns:
            In the first column those of the whole network, on the CPU if they come from several
            columns; nothing in the others.
        """
        whole = {}
        for name, part in parts.items():
            columns = self.columns_of(name)
            tensor = to_first(part.detach(), columns, 0, [len(part)] * columns.count)
            whole[name] = tensor.cpu() if columns.count > 1 else tensor
        return whole if self._columns.index == 0 else {}

    def reset_parameters(self) -> None:
        """Draw the weights and set the biases as the preset says (paper section 5)."""
        preset = self.preset
        if self._columns.count > 1:
            self.load_state_dict(self.part_of(AlexNet(preset, self.num_classes).state_dict()))
            return
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

    def forward(
        self, input: Tensor, dropout_seeds: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        """Class scores.

        Args:
            input: Floating-point [batch, 3, crop_size, crop_size]; any memory format. Or the same
                packed as ``preset.packing`` says, which ``ops.augment`` can write.
            dropout_seeds: int64 [2] on the input's device, one seed per dropout layer. None:
                the op draws them from torch's generator.
            rows: See :meth:`classify`.

        Returns:
            Logits, [batch, num_classes]; [batch, 0] in all columns but the first, of which a sum
            is what they call backward on.

        Raises:
            ValueError: ``input`` or ``dropout_seeds`` has another shape, or there are no seeds,
                which columns must agree on.
        """
        return self.classify(self.features(input), dropout_seeds, rows)

    def features(self, input: Tensor) -> Tensor:
        """What the convolutions make of images.

        Args:
            input: As in :meth:`forward`.

        Returns:
            [batch, maps of this column * final_size**2].

        Raises:
            ValueError: ``input`` has another shape.
        """
        _check_images(self.preset, input)
        x = input
        for index, layer in enumerate(self._convolutions):
            if index and layer.groups == 1:
                x = self._seen(x, self._mesh.convolution_columns)
            x = self._convolve(layer, x)
        return x.flatten(1)

    def classify(
        self, features: Tensor, dropout_seeds: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        """What the fully connected layers make of :meth:`features`.

        Args:
            features: Of this process's images.
            dropout_seeds: As in :meth:`forward`.
            rows: Those of the whole batch that this column sees, in a hybrid with the other
                columns: dropout masks belong to rows of the whole batch. None for the first, of
                which columns of a hybrid have equally many.

        Returns:
            As :meth:`forward`.

        Raises:
            ValueError: As :meth:`forward`.
        """
        columns, x = self._columns, features
        self._check_seeds(dropout_seeds)
        if self._mesh.hybrid:
            rows = rows or range(len(x) * columns.count)
            shares = [len(portion(rows, index, columns.count)) for index in range(columns.count)]
            x = gathered(x, columns, 0, shares, self._travelling(x))
            if self.preset.fc_groups[0] > 1:
                x = x.chunk(columns.count, 1)[columns.index]
        for index, fc in enumerate((self.fc6, self.fc7)):
            groups = self.preset.fc_groups[index]
            if groups == 1 and not (self._mesh.hybrid and index == 0):
                x = self._seen(x, columns)
            seed = None if dropout_seeds is None else dropout_seeds[index]
            x = self._connect(fc, groups, x, seed, rows.start if rows else 0)
        x = to_first(x, columns, 1, [x.shape[1]] * columns.count, self._travelling(x))
        logits: Tensor = self.fc8(x) if columns.index == 0 else x
        return logits

    def _seen(self, x: Tensor, columns: Axis) -> Tensor:
        """The maps or units of all columns."""
        whole: Tensor = gathered(x, columns, 1, [x.shape[1]] * columns.count, self._travelling(x))
        return whole

    def _travelling(self, x: Tensor) -> torch.dtype | None:
        return self._exchange_dtype if x.element_size() > 2 else None

    def _convolve(self, layer: Convolution, x: Tensor) -> Tensor:
        """A convolution with what follows it."""
        preset, norm, steps = self.preset, self._own_norm, layer.steps
        operands = _operands(getattr(self, layer.name), x, layer.padding)
        if norm is not None and steps == ("relu", "norm", "pool"):
            return ops.conv2d_bias_relu_lrn_max_pool2d(
                x,
                **operands,
                **_arguments(norm),
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
        rest = list(steps[relu_first:])
        while rest:
            if rest[:2] == ["norm", "pool"] and preset.response_norm:
                x = self._normalise(x, pool=True)
                del rest[:2]
            else:
                x = functions[rest.pop(0)](x)
        return x

    @property
    def _own_norm(self) -> ResponseNorm | None:
        """The normalisation, where a column can do it alone."""
        norm, count = self.preset.response_norm, self._mesh.convolution_columns.count
        if norm is None or norm.groups % count:
            return None
        return replace(norm, groups=norm.groups // count)

    def _normalise(self, x: Tensor, pool: bool = False) -> Tensor:
        """Normalisation across maps, and the pooling behind it."""
        if self.preset.response_norm is None:
            return x
        if own := self._own_norm:
            return self._normalise_own(x, own, pool)
        return self._normalise_across(x, self.preset.response_norm, pool)

    def _normalise_own(self, x: Tensor, norm: ResponseNorm, pool: bool) -> Tensor:
        """As if there were no other maps than these."""
        preset, constants = self.preset, {**_arguments(norm), "groups": norm.groups}
        if not pool:
            return ops.local_response_norm(x, **constants)
        return ops.lrn_max_pool2d(
            x, **constants, kernel_size=preset.pool_kernel, stride=2, ceil_mode=preset.ceil_mode
        )

    def _normalise_across(self, x: Tensor, norm: ResponseNorm, pool: bool) -> Tensor:
        """With windows that reach into the columns beside this one.

        Those maps travel while all but this column's outermost are done.
        """
        before, behind = norm.size // 2, (norm.size - 1) // 2
        borders = Borders(x, self._columns, before, behind)
        inner = self._normalise_own(x, norm, pool)
        left, right = borders.wait()
        first, last = left.shape[1], x.shape[1] - right.shape[1]
        parts = [inner[:, first:last]]
        if first:
            window = torch.cat((left, x[:, : before + behind]), 1)
            parts.insert(0, self._normalise_own(window, norm, pool)[:, before : 2 * before])
        if last < x.shape[1]:
            window = torch.cat((x[:, -(before + behind) :], right), 1)
            parts.append(self._normalise_own(window, norm, pool)[:, before : before + behind])
        return torch.cat(parts, 1)

    def _pool(self, x: Tensor) -> Tensor:
        """Max-pooling, overlapping where the kernel is 3 (paper section 3.4)."""
        preset = self.preset
        output = ops.max_pool2d(x, preset.pool_kernel, 2, ceil_mode=preset.ceil_mode)
        assert isinstance(output, Tensor)  # a pair only if indices are asked for
        return output

    def _connect(
        self, layer: nn.Linear, groups: int, x: Tensor, seed: Tensor | None, first_row: int
    ) -> Tensor:
        """A hidden layer with its dropout (paper section 4.2).

        Masks are those of the whole layer on the whole batch.
        """
        preset, columns = self.preset, self._columns
        p, mode, seen = preset.dropout, preset.dropout_mode, x.shape[1]
        count = max(groups // columns.count, 1)  # of groups in this column
        if preset.dropout_before:
            own = columns if groups > 1 else Axis()  # the columns that see different units
            x = ops.dropout(
                x,
                p,
                self.training,
                mode=mode,
                seed=seed,
                index_offset=(first_row * own.count + own.index) * seen,
                row_stride=own.count * seen,
            )
            p = 0.0
        if count > 1 and seed is None and self.training and p:
            seed = draw_seed(x.device)  # one mask over all groups
        units, width = layer.out_features // count, layer.out_features * columns.count
        first = first_row * width + columns.index * layer.out_features
        parts = [
            ops.linear_bias_relu_dropout(
                *operands,
                p=p,
                training=self.training,
                mode=mode,
                seed=seed,
                index_offset=first + group * units,
                row_stride=width,
            )
            for group, operands in enumerate(
                zip(
                    x.chunk(count, 1),
                    layer.weight.chunk(count),
                    layer.bias.chunk(count),
                    strict=True,
                )
            )
        ]
        return torch.cat(parts, 1) if count > 1 else parts[0]

    def _check_seeds(self, dropout_seeds: Tensor | None) -> None:
        if dropout_seeds is None:
            if self._mesh.processes > 1 and self.training and self.preset.dropout:
                raise ValueError("columns and replicas need dropout_seeds, which all agree on")
        elif dropout_seeds.shape != (2,):
            raise ValueError(
                f"dropout_seeds must have shape [2] (one per dropout layer), "
                f"got {list(dropout_seeds.shape)}"
            )


def _arguments(norm: ResponseNorm) -> dict[str, Any]:
    """Those of normalisation but the groups, which not all ops call the same."""
    return {
        "size": norm.size,
        "alpha": norm.alpha,
        "beta": norm.beta,
        "k": norm.k,
        "alpha_mode": norm.alpha_mode,
    }


def _of_column(channels: int, groups: int, count: int) -> tuple[int, int]:
    """A convolution's channels and groups in one of ``count`` columns."""
    return (channels, 1) if groups == 1 else (channels // count, groups // count)


def _check_columns(preset: Preset, mesh: Mesh) -> None:
    """Refuse what does not divide into columns."""
    layers: list[tuple[str, int, int]] = []
    if not mesh.hybrid:
        layers += [(each.name, each.width, each.groups) for each in preset.convolutions]
        if norm := preset.response_norm:
            layers.append(("the normalisation", preset.widths[0], norm.groups))
    layers += zip(("fc6", "fc7"), preset.fc_widths, preset.fc_groups, strict=True)
    count = mesh.columns.count
    for name, width, groups in layers:
        if width % count or (groups > 1 and groups % count):
            raise ValueError(
                f"preset {preset.name!r} does not divide into {count} columns: {name} has {width} "
                f"maps or units in {groups} groups"
            )
    norm = None if mesh.hybrid or count == 1 else preset.response_norm
    if norm and norm.groups == 1:
        for layer in preset.convolutions:
            if "norm" in layer.steps and layer.width // count < norm.size - 1:
                raise ValueError(
                    f"preset {preset.name!r} does not divide into {count} columns: {layer.name} "
                    f"has {layer.width // count} maps in each, and normalisation of size "
                    f"{norm.size} needs {norm.size - 1}"
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


def _check_images(preset: Preset, input: Tensor) -> None:
    shapes = _image_shapes(preset)
    if input.dim() != 4 or list(input.shape[1:]) not in shapes:
        accepted = ", or packed ".join(f"[batch, {', '.join(map(str, each))}]" for each in shapes)
        raise ValueError(
            f"preset {preset.name!r} takes images of shape {accepted}, got {list(input.shape)}"
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
