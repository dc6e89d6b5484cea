import importlib.util
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import alexkern
from alexkern import ops
from alexkern.models import PRESETS, AlexNet, Preset, alexnet
from alexkern.models.network import spatial_response_norm
from alexkern.parallel import Axis, Mesh

LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


def on_meta(preset: str, num_classes: int = 1000) -> AlexNet:
    with torch.device("meta"):
        return alexnet(preset, num_classes)


def images(preset: str, batch: int = 2, scale: float = 60.0) -> Tensor:
    size = PRESETS[preset].crop_size
    random = torch.Generator().manual_seed(3)
    return scale * torch.randn(batch, 3, size, size, generator=random, dtype=torch.float64)


CONV1 = (96, 363, 55)  # outputs, inputs of one of them, side of the maps
FC6, FC7, FC8 = (4096, 9216, 1), (4096, 4096, 1), (1000, 4096, 1)
PAPER = [
    *(CONV1, (256, 1200, 27), (384, 2304, 13), (384, 1728, 13), (256, 1728, 13)),
    *(FC6, FC7, FC8),
]
ONE_GPU = [
    *((48, 363, 55), (128, 1200, 27), (192, 1152, 13), (192, 1728, 13), (256, 1728, 13)),
    *(FC6, FC7, FC8),
]
ONE_COLUMN = [
    *((64, 363, 55), (192, 1600, 27), (384, 1728, 13), (256, 3456, 13), (256, 2304, 13)),
    *(FC6, FC7, FC8),
]
# Layer by layer as the sources have them, and where a total is published, that.
LAYERS_OF = {
    "paper": PAPER,
    "krizhevsky2012": PAPER,
    "one_gpu": ONE_GPU,
    "one_gpu_2012": ONE_GPU,
    "no_lrn": PAPER,
    "no_lrn2": PAPER,
    "no_overlap": [
        *(CONV1, (256, 1200, 26), (384, 2304, 13), (384, 1728, 13), (256, 1728, 11)),
        *(FC6, FC7, FC8),
    ],
    "conv6": [*PAPER[:5], (256, 2304, 6), FC6, FC7, FC8],
    "minus_conv3": [*PAPER[:2], (384, 2304, 13), *PAPER[4:]],
    "minus_conv4": [*PAPER[:3], *PAPER[4:]],
    "no_exchange": [
        *(CONV1, (320, 1200, 27), (384, 1440, 13), (384, 1728, 13), (256, 1728, 13)),
        *((8192, 4608, 1), (4096, 4096, 1), FC8),
    ],
    "exchange_conv4": [*PAPER[:2], (384, 1152, 13), (384, 3456, 13), *PAPER[4:]],
    "exchange_all": [
        *(CONV1, (256, 2400, 27), (384, 2304, 13), (384, 3456, 13), (256, 3456, 13)),
        *(FC6, FC7, FC8),
    ],
    "cuda_convnet2": ONE_COLUMN,
    "caffe_alexnet": PAPER,
    "caffenet": PAPER,
    "owt": ONE_COLUMN,
}
PUBLISHED = {
    "paper": (60_965_224, 724_406_816),
    "krizhevsky2012": (60_965_224, 724_406_816),
    "one_gpu": (59_798_312, 391_514_384),
    "one_gpu_2012": (59_798_312, 391_514_384),
    "exchange_all": (62_378_344, 1_135_256_096),
    "conv6": (60_965_224 + 590_080, 724_406_816 + 589_824 * 36),
    "caffe_alexnet": (60_965_224, 724_406_816),
    "caffenet": (60_965_224, 724_406_816),
    "owt": (61_100_840, 714_188_480),
}


def test_layers_of_every_network_are_listed():
    assert [*LAYERS_OF, "mini"] == list(PRESETS)


@pytest.mark.parametrize("preset", LAYERS_OF)
def test_numbers_of_parameters_and_products(preset):
    model = on_meta(preset)
    size = model.preset.crop_size
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    counts = sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
    layers = LAYERS_OF[preset]
    assert counts == (
        sum(outputs * (inputs + 1) for outputs, inputs, _ in layers),
        sum(outputs * inputs * side**2 for outputs, inputs, side in layers),
    )
    assert counts == PUBLISHED.get(preset, counts)
    assert model.preset.final_size == 6


def test_parameters_per_layer_of_the_paper():
    model = on_meta("paper")
    counts = [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in LAYERS]
    assert counts == [
        *(34_944, 307_456, 885_120, 663_936, 442_624),
        *(37_752_832, 16_781_312, 4_097_000),
    ]


@pytest.fixture
def recorded(monkeypatch):
    """Shapes of what the ops give, products per image, and the arguments of dropout."""
    record = {"conv": [], "pool": [], "norm": [], "dropout": [], "macs": 0}

    def convolve(x, weight, *args, **kwargs):
        output = original["conv2d_bias_relu"](x, weight, *args, **kwargs)
        record["conv"].append(tuple(output.shape[1:]))
        record["macs"] += output[0].numel() * weight[0].numel()
        return output

    def pool(x, *args, **kwargs):
        output = original["max_pool2d"](x, *args, **kwargs)
        record["pool"].append(tuple(output.shape[1:]))
        return output

    def norm(x, **constants):
        names = ("size", "alpha", "beta", "k", "alpha_mode", "groups")
        record["norm"].append((tuple(x.shape[1:]), tuple(constants[name] for name in names)))
        return original["local_response_norm"](x, **constants)

    def norm_and_pool(x, *, kernel_size, stride, ceil_mode, **constants):
        return pool(norm(x, **constants), kernel_size, stride, ceil_mode=ceil_mode)

    def dropout(x, p, training, *, mode, **place):
        record["dropout"].append((x.shape[1], p, training, mode))
        return original["dropout"](x, p, training, mode=mode, **place)

    def linear(x, weight, bias, *, p, training, mode, **place):
        if p:
            record["dropout"].append((weight.shape[0], p, training, mode))
        layer = original["linear_bias_relu_dropout"]
        return layer(x, weight, bias, p, training, mode=mode, **place)

    def whole(x, weight, bias, stride, padding, groups, **tail):
        maps = convolve(x, weight, bias, stride=stride, padding=padding, groups=groups)
        names = ("size", "alpha", "beta", "k", "alpha_mode")
        constants = {name: tail[name] for name in names}
        normalised = norm(maps, **constants, groups=tail["norm_groups"])
        return pool(normalised, tail["kernel_size"], tail["pool_stride"])

    replacements = {
        "conv2d_bias_relu": convolve,
        "conv2d_bias_relu_lrn_max_pool2d": whole,
        "max_pool2d": pool,
        "local_response_norm": norm,
        "lrn_max_pool2d": norm_and_pool,
        "dropout": dropout,
        "linear_bias_relu_dropout": linear,
    }
    original = {name: getattr(ops, name) for name in replacements}
    for name, function in replacements.items():
        monkeypatch.setattr(ops, name, function)
    return record


def test_shapes_and_products_of_the_paper(recorded):
    model = alexnet("paper").double()
    for layer in (model.fc6, model.fc7, model.fc8):
        recorded["macs"] += layer.weight.numel()
    assert model.eval()(images("paper", 1)).shape == (1, 1000)
    assert recorded["conv"] == [
        *((96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)),
    ]
    assert recorded["pool"] == [(96, 27, 27), (256, 13, 13), (256, 6, 6)]
    assert recorded["norm"] == [
        ((96, 55, 55), (5, 1e-4, 0.75, 2.0, "sum", 1)),
        ((256, 27, 27), (5, 1e-4, 0.75, 2.0, "sum", 1)),
    ]
    assert recorded["dropout"] == [(4096, 0.5, False, "paper")] * 2
    assert recorded["macs"] == 724_406_816


def test_maps_of_no_overlap(recorded):
    """55 -> 28 (rounded up) -> 26 -> 13, 13, 13 -> 11 -> 6, as layers-147 has them."""
    AlexNet(small(PRESETS["no_overlap"]), 3).double()(images("no_overlap", 1))
    assert [shape[1] for shape in recorded["conv"]] == [55, 26, 13, 13, 11]
    assert [shape[1] for shape in recorded["pool"]] == [28, 13, 6]


def test_mini_shrinks_as_the_paper_does(recorded):
    model = alexnet("mini", 10).double()
    assert model(images("mini")).shape == (2, 10)
    assert [shape[1:] for shape in recorded["conv"]] == [(15, 15), (7, 7), (3, 3), (3, 3), (3, 3)]
    assert [shape[1:] for shape in recorded["pool"]] == [(7, 7), (3, 3), (1, 1)]
    assert len(recorded["norm"]) == len(recorded["dropout"]) == 2
    groups = [getattr(model, name).groups for name in LAYERS[:5]]
    assert groups == [1, 2, 1, 2, 2]


def test_owt_drops_before_the_layers(recorded):
    alexnet("owt", 3).double()(images("owt", 1))
    assert recorded["dropout"] == [(9216, 0.5, True, "inverted"), (4096, 0.5, True, "inverted")]
    assert recorded["norm"] == []


@pytest.mark.parametrize(
    ("preset", "middle_std"), [("paper", 0.01), ("krizhevsky2012", 0.03), ("one_gpu", 0.01)]
)
def test_initialisation_of_the_paper(preset, middle_std):
    torch.manual_seed(0)
    model = alexnet(preset)
    stds = [0.01, 0.01, middle_std, middle_std, middle_std, 0.01, 0.01, 0.01]
    biases = [0, 1, 0, 1, 1, 1, 1, 0]
    for name, std, bias in zip(LAYERS, stds, biases, strict=True):
        layer = model.get_submodule(name)
        check_normal(layer.weight.detach(), std)
        assert torch.all(layer.bias == bias), name


CODE_STDS = [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01]
CAFFE_STDS = [0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01]
BIASES = [0, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("preset", "stds", "biases"),
    [
        ("one_gpu_2012", CODE_STDS, BIASES),
        ("no_lrn", CODE_STDS, BIASES),
        ("no_lrn2", CODE_STDS, BIASES),
        ("no_overlap", CODE_STDS, BIASES),
        ("conv6", [*CODE_STDS[:5], 0.03, *CODE_STDS[5:]], [0, 1, 0, 1, 1, 1, 1, 1, 0]),
        ("minus_conv3", [0.01, 0.01, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 1, 1, 1, 1, 0]),
        ("minus_conv4", [0.01, 0.01, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 0]),
        ("no_exchange", CODE_STDS, BIASES),
        ("exchange_conv4", CODE_STDS, BIASES),
        ("exchange_all", CODE_STDS, BIASES),
        ("cuda_convnet2", CODE_STDS, [*BIASES[:-1], -7]),
        ("caffe_alexnet", CAFFE_STDS, [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
        ("caffenet", CAFFE_STDS, BIASES),
    ],
)
def test_initialisation_of_the_others(preset, stds, biases):
    torch.manual_seed(0)
    numbers = PRESETS[preset]
    narrow = tuple(min(width, 32) for width in numbers.widths)
    model = AlexNet(replace(numbers, widths=narrow, fc_widths=(128, 128)), 100)
    for layer, std, bias in zip(model.children(), stds, biases, strict=True):
        check_normal(layer.weight.detach(), std)
        assert torch.all(layer.bias == bias)


def test_initialisation_of_mini():
    torch.manual_seed(0)
    model = alexnet("mini", 10)
    for name in LAYERS:
        layer = model.get_submodule(name)
        check_normal(layer.weight.detach(), math.sqrt(2 / layer.weight[0].numel()))
        assert torch.all(layer.bias == 0)


def check_normal(weight: Tensor, std: float) -> None:
    """Mean and standard deviation within five standard errors; tails as a normal's."""
    count = weight.numel()
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(count)
    assert abs(weight.std().item() - std) < 5 * std / math.sqrt(2 * count)
    within_one = (weight.abs() < std).double().mean().item()
    assert abs(within_one - 0.6827) < 5 * 0.47 / math.sqrt(count)


def test_initialisation_follows_the_seed():
    torch.manual_seed(5)
    first, other = alexnet("mini", 10), alexnet("mini", 10)
    torch.manual_seed(5)
    again = alexnet("mini", 10)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


# Every network once more, step by step: of a convolution padding and columns, of a normalisation
# alpha as PyTorch takes it, k and columns, of a pooling its kernel, of a connected layer columns.
CODE_1_2 = (
    "conv1 0303 1, norm 1e-4 2 2, pool 3, relu, conv2 2 2, relu, norm 1e-4 2 2, spatial, pool 3"
)
CODE_5 = "conv5 1 2, pool 3, relu"
CODE_TO_5 = f"{CODE_1_2}, conv3 1 1, relu, conv4 1 2, relu, {CODE_5}"
FC = "fc6 1, relu, keep, fc7 1, relu, keep, fc8 1"
FC_INVERTED = "fc6 1, relu, drop, fc7 1, relu, drop, fc8 1"
PLAIN = {
    "paper": "conv1 0303 1, relu, norm 5e-4 2 1, pool 3, conv2 2 2, relu, norm 5e-4 2 1, pool 3, "
    f"conv3 1 1, relu, conv4 1 2, relu, conv5 1 2, relu, pool 3, {FC}",
    "krizhevsky2012": f"{CODE_TO_5}, {FC}",
    "one_gpu": "conv1 0303 1, relu, norm 5e-4 2 1, pool 3, conv2 2 1, relu, norm 5e-4 2 1, pool 3, "
    f"conv3 1 1, relu, conv4 1 1, relu, conv5 1 1, relu, pool 3, {FC}",
    "one_gpu_2012": "conv1 0303 1, norm 1e-4 2 1, pool 3, relu, conv2 2 1, relu, norm 1e-4 2 1, "
    f"spatial, pool 3, conv3 1 1, relu, conv4 1 1, relu, conv5 1 1, pool 3, relu, {FC}",
    "no_lrn": "conv1 0303 1, pool 3, relu, conv2 2 2, relu, pool 3, "
    f"conv3 1 1, relu, conv4 1 2, relu, {CODE_5}, {FC}",
    "no_lrn2": "conv1 0303 1, norm 1e-4 2 2, pool 3, relu, conv2 2 2, relu, pool 3, "
    f"conv3 1 1, relu, conv4 1 2, relu, {CODE_5}, {FC}",
    "no_overlap": "conv1 0303 1, norm 1e-4 2 2, pool 2, relu, conv2 1 2, relu, norm 1e-4 2 2, "
    "spatial, pool 2, conv3 1 1, relu, conv4 1 2, relu, conv5 0 2, pool 2, relu, "
    f"{FC}",
    "conv6": f"{CODE_TO_5}, conv6 1 1, relu, {FC}",
    "minus_conv3": f"{CODE_1_2}, conv4 1 1, relu, {CODE_5}, {FC}",
    "minus_conv4": f"{CODE_1_2}, conv3 1 1, relu, {CODE_5}, {FC}",
    "no_exchange": f"{CODE_1_2}, conv3 1 2, relu, conv4 1 2, relu, {CODE_5}, "
    "fc6 2, relu, keep, fc7 2, relu, keep, fc8 1",
    "exchange_conv4": f"{CODE_1_2}, conv3 1 2, relu, conv4 1 1, relu, {CODE_5}, {FC}",
    "exchange_all": "conv1 0303 1, norm 1e-4 2 2, pool 3, relu, conv2 2 1, relu, norm 1e-4 2 2, "
    f"spatial, pool 3, conv3 1 1, relu, conv4 1 1, relu, conv5 1 1, pool 3, relu, {FC}",
    "cuda_convnet2": "conv1 0303 1, norm 1e-4 2 1, pool 3, relu, conv2 2 1, relu, norm 1e-4 2 1, "
    f"pool 3, conv3 1 1, relu, conv4 1 1, relu, conv5 1 1, pool 3, relu, {FC}",
    "caffe_alexnet": "conv1 0 1, relu, norm 1e-4 1 1, pool 3, conv2 2 2, relu, norm 1e-4 1 1, "
    f"pool 3, conv3 1 1, relu, conv4 1 2, relu, conv5 1 2, relu, pool 3, {FC_INVERTED}",
    "caffenet": "conv1 0 1, relu, pool 3, norm 1e-4 1 1, conv2 2 2, relu, pool 3, norm 1e-4 1 1, "
    f"conv3 1 1, relu, conv4 1 2, relu, conv5 1 2, relu, pool 3, {FC_INVERTED}",
    "owt": "conv1 2222 1, relu, pool 3, conv2 2 1, relu, pool 3, conv3 1 1, relu, conv4 1 1, relu, "
    "conv5 1 1, relu, pool 3, drop, fc6 1, relu, drop, fc7 1, relu, fc8 1",
    "mini": "conv1 0101 1, relu, norm 5e-1 1 1, pool 3, conv2 2 2, relu, norm 5e-1 1 1, pool 3, "
    f"conv3 1 1, relu, conv4 1 2, relu, conv5 1 2, relu, pool 3, {FC}",
}


def by_column(function, columns: str, x: Tensor, *parameters: Tensor) -> Tensor:
    parts = [x.chunk(int(columns), 1), *(p.chunk(int(columns)) for p in parameters)]
    return torch.cat([function(*operands) for operands in zip(*parts, strict=True)], 1)


def plain(model: AlexNet, x: Tensor, seeds: Tensor) -> Tensor:
    """The network by PyTorch's own functions; columns are computed one after the other."""
    p, seeds_left = model.preset.dropout, list(seeds)
    for name, *numbers in map(str.split, PLAIN[model.preset.name].split(",")):
        if name.startswith("conv"):
            layer, (padding, columns) = model.get_submodule(name), numbers
            stride = model.preset.conv1_stride if name == "conv1" else 1
            x = F.pad(x, [int(digit) for digit in (4 * padding)[:4]])
            convolve = partial(F.conv2d, stride=stride)
            x = by_column(convolve, columns, x, layer.weight, layer.bias)
        elif name.startswith("fc"):
            layer = model.get_submodule(name)
            x = by_column(F.linear, *numbers, x.flatten(1), layer.weight, layer.bias)
        elif name == "norm":
            alpha, k, columns = numbers
            norm = partial(F.local_response_norm, size=5, alpha=float(alpha), k=float(k))
            x = by_column(norm, columns, x)
        elif name == "spatial":
            windows = F.unfold((x * x).flatten(0, 1)[:, None], 5, padding=2).sum(1)
            x = x / (1 + 0.001 * windows.view(x.shape) / 25) ** 0.75
        elif name == "pool":
            x = F.max_pool2d(x, int(numbers[0]), 2, ceil_mode=True)
        elif name == "relu":
            x = F.relu(x)
        elif model.training:  # one mask over all columns
            x = x.flatten(1)
            kept = ops.dropout(torch.ones_like(x), p, mode="paper", seed=seeds_left.pop(0))
            x = x * kept / (1 if name == "keep" else 1 - p)
        elif name == "keep":
            x = x * (1 - p)
    return x


@pytest.mark.parametrize("name", PRESETS)
def test_every_network_equals_its_description(name):
    """Logits of training and of testing, and the gradients of every parameter."""
    torch.manual_seed(0)
    model = AlexNet(small(PRESETS[name]), 3).double()
    x, seeds = images(name, 2), torch.tensor([1, 2])
    for training in (True, False):
        model.train(training)
        results = []
        for logits in (model(x, seeds), plain(model, x, seeds)):
            gradients = torch.autograd.grad(logits.square().sum(), tuple(model.parameters()))
            results.append((logits.detach(), *gradients))
        rounding = 2**-52 * math.sqrt(x[:, 0].numel())  # of the longest sum, over pixels
        for ours, theirs in zip(*results, strict=True):
            largest = theirs.abs().max()
            assert largest > 0
            assert (ours - theirs).abs().max() <= rounding * largest


def test_one_mask_over_both_columns():
    """Without seeds one is drawn for each layer, and the columns take their parts of its mask."""
    model = AlexNet(small(PRESETS["no_exchange"]), 3)
    x = images("no_exchange", 1).float()
    torch.manual_seed(7)
    seeds = torch.stack([torch.randint(-(2**63), 2**63 - 1, ()) for _ in range(2)])
    torch.manual_seed(7)
    assert torch.equal(model(x), model(x, seeds))


def test_spatial_norm_counts_outside_pixels_as_zero():
    x = torch.full((1, 1, 3, 3), 100.0, dtype=torch.float64)
    # All nine pixels lie in every 5x5 window: mean square 9 * 100**2 / 25 = 3600.
    expected = torch.full_like(x, 100 * (1 + 0.001 * 3600) ** -0.75)
    torch.testing.assert_close(spatial_response_norm(x), expected)


def torchvision_copy(num_classes: int) -> nn.Module:
    """torchvision's structure under its names."""
    model = nn.Module()
    model.features = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    model.classifier = nn.Sequential(
        *(nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, num_classes),
    )
    model.forward = lambda x: model.classifier(model.features(x).flatten(1))
    return model


def check_takes_state_of(theirs: nn.Module) -> None:
    theirs.double().eval()
    ours = alexnet("owt", 7).double().eval()
    state = theirs.state_dict()
    names = list(state)
    ours.load_state_dict(state)
    assert list(state) == names
    x = images("owt", scale=1.0)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_owt_takes_the_names_of_torchvision():
    check_takes_state_of(torchvision_copy(7))


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="no torchvision")
def test_owt_equals_torchvision():
    try:
        from torchvision.models import alexnet as theirs
    except RuntimeError as error:
        pytest.skip(f"torchvision does not fit this torch: {error}")
    check_takes_state_of(theirs(num_classes=7))


def test_state_dict_round_trip():
    first, second = alexnet("mini", 4), alexnet("mini", 4)
    assert list(first.state_dict()) == [
        f"{name}.{kind}" for name in LAYERS for kind in ("weight", "bias")
    ]
    second.load_state_dict(first.state_dict())
    x = images("mini", scale=1.0).float()
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_equal_dropout_seeds_give_equal_outputs():
    model = alexnet("mini", 4)
    x = images("mini", scale=1.0).float()
    one = model(x, torch.tensor([1, 2]))
    assert torch.equal(one, model(x, torch.tensor([1, 2])))
    assert not torch.equal(one, model(x, torch.tensor([3, 2])))
    assert not torch.equal(one, model(x, torch.tensor([1, 3])))
    torch.manual_seed(0)
    drawn = model(x)
    assert not torch.equal(drawn, model(x))
    torch.manual_seed(0)
    assert torch.equal(drawn, model(x))


def test_layouts_agree():
    model = alexnet("mini", 4).double().eval()
    x = images("mini", scale=1.0)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def packed(preset: Preset, x: Tensor) -> Tensor:
    assert preset.packing
    return F.pixel_unshuffle(F.pad(x, preset.packing.padding), preset.packing.space_to_depth)


def test_packing_is_what_conv1_reads():
    """54 strides of 4, and 12 for the last of the 55 outputs, whose kernel is 3 blocks wide."""
    assert PRESETS["paper"].packing == ((0, 4, 0, 4), 4)
    assert PRESETS["caffe_alexnet"].packing == ((0, 1, 0, 1), 4)  # 227 pixels of the same 228
    assert PRESETS["owt"].packing == ((2, 2, 2, 2), 4)
    assert PRESETS["mini"].packing == ((0, 2, 0, 2), 2)
    assert replace(PRESETS["paper"], conv1_stride=1).packing is None
    unread = replace(PRESETS["mini"], conv1_kernel=4, conv1_stride=4, conv1_padding=(0, 0, 0, 0))
    assert replace(unread, crop_size=32).packing == ((0, 0, 0, 0), 4)
    assert replace(unread, crop_size=33).packing is None  # the last pixel is read by nobody


def small(preset: Preset) -> Preset:
    """The same geometry, with few channels and units."""
    widths = tuple(min(width, 8) for width in preset.widths)
    return replace(preset, widths=widths, fc_widths=(16, 8), weight_std=None)


@pytest.mark.parametrize("preset", [small(preset) for preset in PRESETS.values()], ids=PRESETS)
def test_packed_images_give_the_same(preset):
    """Logits, and gradients of the parameters as they are kept."""
    torch.manual_seed(0)
    model = AlexNet(preset, 3).double()
    x = images(preset.name, scale=1.0)
    seeds = torch.tensor([1, 2])
    results = []
    for given in (x, packed(preset, x)):
        logits = model(given, seeds)
        gradients = torch.autograd.grad(logits.square().sum(), tuple(model.parameters()))
        results.append((logits.detach(), *gradients))
    rounding = 2**-52 * math.sqrt(x[:, 0].numel())  # of the longest sum, over pixels
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for name, plain, other in zip(names, *results, strict=True):
        error, largest = (other - plain).abs().max(), plain.abs().max()
        assert largest > 0, name
        assert error <= rounding * largest, f"{name}: {error}"


@pytest.mark.parametrize("pack", [lambda preset, x: x, packed], ids=["plain", "packed"])
def test_kernels_agree_with_plain_pytorch_in_a_whole_step(pack):
    """Both against float64, gradients of every parameter included."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = alexnet("mini", 4).to(device)
    x = images("mini", scale=1.0).to(device)
    seeds = torch.tensor([1, 2], device=device)

    def step(backend: str, dtype: torch.dtype) -> list[Tensor]:
        model.to(dtype).zero_grad()
        given = pack(model.preset, x.to(dtype)) if backend == "triton" else x.to(dtype)
        with alexkern.use_backend(backend):
            loss = F.cross_entropy(model(given, seeds), torch.tensor([1, 3], device=device))
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters()]

    exact = step("torch", torch.float64)
    # Rounding of the longest sum, over the pixels of conv1's outputs.
    floor = 2**-23 * math.sqrt(2 * 15 * 15)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, ours, theirs, truth in zip(
        names, step("triton", torch.float32), step("torch", torch.float32), exact, strict=True
    ):
        error = (ours - truth).abs().max()
        assert error <= 2 * (theirs - truth).abs().max() + floor * truth.abs().max(), name


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"'papr'.*paper, krizhevsky2012, one_gpu, .*, owt, mini"):
        alexnet("papr")


def test_too_few_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        alexnet("mini", 0)


def test_a_seed_draws_the_same_network_in_columns():
    torch.manual_seed(3)
    whole = alexnet("mini", 4)
    torch.manual_seed(3)
    column = AlexNet(PRESETS["mini"], 4, Mesh(columns=Axis(1, 2)))
    first = {name: tensor.clone() for name, tensor in column.state_dict().items()}
    torch.manual_seed(3)
    column.reset_parameters()
    for name, tensor in column.part_of(whole.state_dict()).items():
        assert torch.equal(first[name], tensor), name
        assert torch.equal(column.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 32, 33), (1, 1, 32, 32), (3, 32, 32), (1, 3, 224, 224), (1, 12, 16, 16), (12, 17, 17)],
)
def test_wrong_input_names_the_expected_crop(shape):
    expected = r"'mini' takes .*\[batch, 3, 32, 32\], or packed \[batch, 12, 17, 17\], got"
    with pytest.raises(ValueError, match=expected):
        alexnet("mini", 4)(torch.zeros(shape))


def test_wrong_number_of_dropout_seeds():
    with pytest.raises(ValueError, match=r"shape \[2\].*got \[3\]"):
        alexnet("mini", 4)(torch.zeros(1, 3, 32, 32), torch.tensor([1, 2, 3]))
