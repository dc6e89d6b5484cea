"""Each module against the modules of torch.nn that it stands for."""

import copy
import inspect
import math
import pickle
from types import SimpleNamespace

import numerics
import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, check_same, gradient_like, leaves
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import alexkern
from alexkern.nn import (
    Conv2dBiasReLU,
    Dropout,
    LinearBiasReLUDropout,
    LocalResponseNorm,
    LRNMaxPool2d,
    MaxPool2d,
)

SHAPE = (2, 6, 7, 5)
CONV = {"stride": 2, "padding": (1, 2), "dilation": (2, 1), "groups": 2}
POOL = {"stride": (3, 1), "padding": 1, "dilation": (2, 1), "ceil_mode": True}
NORM = (4, 0.5, 0.6, 1.5)

# name: ours, and torch's one after the other; a dropout's p is 0, so that both are functions
PAIRS = {
    "conv": (
        lambda **made: Conv2dBiasReLU(6, 4, (3, 2), **CONV, **made),
        lambda **made: (nn.Conv2d(6, 4, (3, 2), **CONV, **made), nn.ReLU()),
    ),
    "conv without bias": (
        lambda **made: Conv2dBiasReLU(6, 4, 3, padding="same", bias=False, **made),
        lambda **made: (nn.Conv2d(6, 4, 3, padding="same", bias=False, **made), nn.ReLU()),
    ),
    "conv without activation": (
        lambda **made: Conv2dBiasReLU(6, 4, 3, **made, activation="none"),
        lambda **made: (nn.Conv2d(6, 4, 3, **made),),
    ),
    "linear": (
        lambda **made: LinearBiasReLUDropout(5, 9, **made, p=0.0),
        lambda **made: (nn.Linear(5, 9, **made), nn.ReLU(), nn.Dropout(0.0)),
    ),
    "linear without bias": (
        lambda **made: LinearBiasReLUDropout(5, 9, False, **made, p=0.0, activation="none"),
        lambda **made: (nn.Linear(5, 9, False, **made), nn.Dropout(0.0)),
    ),
    "norm": (lambda: LocalResponseNorm(*NORM), lambda: (nn.LocalResponseNorm(*NORM),)),
    "pool": (lambda: MaxPool2d(3, **POOL), lambda: (nn.MaxPool2d(3, **POOL),)),
    "norm and pool": (
        lambda: LRNMaxPool2d(*NORM, kernel_size=3, **POOL),
        lambda: (nn.LocalResponseNorm(*NORM), nn.MaxPool2d(3, **POOL)),
    ),
    "dropout": (lambda: Dropout(0.0), lambda: (nn.Dropout(0.0),)),
}
WITH_WEIGHTS = [name for name in PAIRS if name.startswith(("conv", "linear"))]
PADDING_MODES = ["reflect", "replicate", "circular"]


def results(module, input):
    """Output and the gradients of the input and of all parameters."""
    (input,) = leaves(input)
    output = module(input)
    wanted = [input, *module.parameters()]
    return output, *torch.autograd.grad(output, wanted, gradient_like(output))


def check_equal_results(ours, theirs, input):
    for actual, expected in zip(results(ours, input), results(theirs, input), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.fixture
def check_by_rule(monkeypatch, backend, launches):
    """A rule of numerics, with a function of ours in the place of the op that it calls."""

    def check(rule, op, function, *tensors, **arguments):
        monkeypatch.setattr(numerics, "ops", SimpleNamespace(**{op: function}))
        getattr(numerics, rule)(*tensors, **arguments)
        assert bool(launches) == (backend == "triton")

    return check


def applied(module):
    """The module as an op: operands and seed are passed, what else is passed must be its own."""

    def call(input, *operands, seed=None, **_):
        names = [name for name, _ in module.named_parameters()]
        weights = dict(zip(names, operands[: len(names)], strict=True))
        return functional_call(module, weights, input, {} if seed is None else {"seed": seed})

    return call


# --- numbers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_in_double_precision(randn, device, backend, name, layout):
    ours, theirs = (make() for make in PAIRS[name])
    ours.load_state_dict(theirs[0].state_dict())
    ours, theirs = (module.to(device).double() for module in (ours, nn.Sequential(*theirs)))
    check_equal_results(ours, theirs, randn(*SHAPE, layout=layout).double())


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_conv_by_the_rule(randn, device, check_by_rule, activation):
    module = Conv2dBiasReLU(6, 4, (3, 2), **CONV, activation=activation).to(device)
    weights = randn(4, 3, 3, 2, seed=1), randn(4, seed=2)
    keys = {**CONV, "activation": activation}
    check_by_rule(
        "check_conv", "conv2d_bias_relu", applied(module), randn(*SHAPE), *weights, **keys
    )


def test_conv_with_four_paddings_by_the_rule(randn, device, check_by_rule):
    """As the 2012 code needs for 224 -> 55."""
    keys = {"stride": 4, "padding": (0, 3, 1, 2)}
    module = Conv2dBiasReLU(6, 4, 3, **keys).to(device)
    weights = randn(4, 6, 3, 3, seed=1), randn(4, seed=2)
    check_by_rule(
        "check_conv", "conv2d_bias_relu", applied(module), randn(*SHAPE), *weights, **keys
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("alpha_mode", ["mean", "sum"])
def test_norm_by_the_rule(randn, check_by_rule, alpha_mode, groups):
    keys = {"alpha_mode": alpha_mode, "groups": groups}
    module = LocalResponseNorm(*NORM, **keys)
    op = "local_response_norm"
    check_by_rule("check_lrn", op, applied(module), randn(*SHAPE), *NORM, **keys)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("alpha_mode", ["mean", "sum"])
def test_norm_and_pool_by_the_rule(randn, check_by_rule, alpha_mode, groups):
    norm = {"alpha": 0.5, "beta": 0.6, "k": 1.5, "alpha_mode": alpha_mode, "groups": groups}
    module = LRNMaxPool2d(4, kernel_size=(3, 2), stride=(2, 1), **norm)
    check_by_rule(
        *("check_lrn_pool", "lrn_max_pool2d", applied(module), randn(*SHAPE), 4, (3, 2), (2, 1)),
        **norm,
    )


def test_pool_by_the_rule(randn, check_by_rule):
    def pool(input, kernel_size, **arguments):
        return MaxPool2d(kernel_size, **arguments)(input)

    check_by_rule("check_pool", "max_pool2d", pool, randn(*SHAPE), 3, **POOL)


def test_pool_gives_indices(randn, backend):
    ours, theirs = (make(3, return_indices=True, **POOL) for make in (MaxPool2d, nn.MaxPool2d))
    for input in (randn(*SHAPE), randn(*SHAPE[1:])):
        for actual, expected in zip(ours(input), theirs(input), strict=True):
            check_same(actual, expected)


@pytest.mark.parametrize("mode", ["inverted", "paper"])
def test_dropout_by_the_rule(randn, device, check_by_rule, mode):
    seed = torch.tensor(12, device=device)
    module = Dropout(0.4, mode=mode)
    input = randn(*SHAPE)
    check_by_rule("check_dropout", "dropout", applied(module), input, seed, p=0.4, mode=mode)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["inverted", "paper"])
def test_linear_by_the_rule(randn, device, check_by_rule, mode, training):
    seed = torch.tensor(12, device=device)
    module = LinearBiasReLUDropout(5, 9, p=0.4, mode=mode).to(device).train(training)
    tensors = randn(3, 7, 5), randn(9, 5, seed=1), randn(9, seed=2), seed
    keys = {"p": 0.4, "training": training, "mode": mode}
    check_by_rule("check_linear", "linear_bias_relu_dropout", applied(module), *tensors, **keys)


@pytest.mark.parametrize("padding", ["same", (1, 2), 1])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_padding_modes(randn, device, padding_mode, padding):
    arguments = {"dilation": (1, 2), "padding": padding, "padding_mode": padding_mode}
    ours, theirs = (
        module(6, 4, (2, 3), **arguments, device=device, dtype=torch.float64)
        for module in (Conv2dBiasReLU, nn.Conv2d)
    )
    ours.load_state_dict(theirs.state_dict())
    input = randn(*SHAPE).double()
    check_equal_results(ours, nn.Sequential(theirs, nn.ReLU()), input)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_padding_modes_of_four_sides(randn, device, padding_mode):
    padding = (0, 3, 1, 2)
    module = Conv2dBiasReLU(6, 4, 3, padding=padding, padding_mode=padding_mode, device=device)
    plain = Conv2dBiasReLU(6, 4, 3, device=device)
    plain.load_state_dict(module.state_dict())
    input = randn(*SHAPE)
    check_same(module(input), plain(F.pad(input, padding, padding_mode)))


# --- the constants of other systems

CHANNELS = 13

# The neighbours of channel i, what their sum of squares is multiplied by, the constant, the power.
SYSTEMS = {
    "paper": (lambda i: range(i - 5 // 2, i + 5 // 2 + 1), 1e-4, 2, 0.75),
    "krizhevsky2012": (lambda i: range(i - 5 // 2, i - 5 // 2 + 5), 1e-4 / 5, 2, 0.75),
    "caffe": (lambda i: range(i - (5 - 1) // 2, i + (5 - 1) // 2 + 1), 1 / 5, 1, 0.75),
    "pytorch": (lambda i: range(i - 5 // 2, i + (5 - 1) // 2 + 1), 1e-4 / 5, 1, 0.75),
    "tensorflow": (lambda d: range(d - 5, d + 5 + 1), 1, 1, 0.5),
    "cudnn": (lambda i: range(i - (5 - 1) // 2, i + 5 - (5 - 1) // 2), 1e-4 / 5, 2, 0.75),
    "onnx": (
        lambda c: range(c - math.floor((5 - 1) / 2), c + math.ceil((5 - 1) / 2) + 1),
        *(1e-4 / 5, 1, 0.75),
    ),
    "matconvnet": (
        lambda k: range(k - math.floor((5 - 1) / 2), k + math.ceil((5 - 1) / 2) + 1),
        *(0.0001 / 5, 1, 0.75),
    ),
    "chainer": (lambda i: range(i - 5 // 2, i + 5 // 2 + 1), 1e-4, 2, 0.75),
    "mxnet": (lambda i: range(i - 5 // 2, i + 5 // 2 + 1), 1e-4 / 5, 2, 0.75),
}


def normalised(input, neighbours, factor, constant, power):
    """The formula, channel by channel."""
    output = torch.empty_like(input)
    for channel in range(CHANNELS):
        near = [other for other in neighbours(channel) if 0 <= other < CHANNELS]
        squares = sum(input[:, other] ** 2 for other in near)
        output[:, channel] = input[:, channel] / (constant + factor * squares) ** power
    return output


@pytest.mark.parametrize("name", SYSTEMS)
def test_preset_is_the_systems_formula(randn, device, backend, name):
    # grey levels, where all terms of the denominator count
    input = 100 * randn(2, CHANNELS, 3, 2).double()
    module = LocalResponseNorm.preset(name)
    torch.testing.assert_close(module(input), normalised(input, *SYSTEMS[name]))


def test_which_presets_are_equal(randn):
    input = 100 * randn(2, CHANNELS, 3, 2).double()
    outputs = {name: LocalResponseNorm.preset(name)(input) for name in SYSTEMS}
    equal = {
        frozenset(other for other in SYSTEMS if torch.allclose(outputs[name], outputs[other]))
        for name in SYSTEMS
    }
    assert equal == {
        frozenset(names)
        for names in (
            ("paper", "chainer"),
            ("krizhevsky2012", "cudnn", "mxnet"),
            ("pytorch", "onnx", "matconvnet"),
            ("caffe",),
            ("tensorflow",),
        )
    }


def test_preset_of_pytorch_is_torchs_own():
    assert repr(LocalResponseNorm.preset("pytorch")) == repr(nn.LocalResponseNorm(5))


def test_preset_with_groups(randn):
    """Each GPU's maps alone, as in the 2012 code."""
    input = 100 * randn(2, 8, 3, 2)
    parts = [LocalResponseNorm.preset("krizhevsky2012")(part) for part in input.chunk(2, 1)]
    whole = LocalResponseNorm.preset("krizhevsky2012", groups=2)(input)
    check_same(whole, torch.cat(parts, 1))


def test_preset_of_a_subclass():
    class Own(LocalResponseNorm):
        pass

    assert type(Own.preset("paper")) is Own


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'keras'") as raised:
        LocalResponseNorm.preset("keras")
    assert all(name in str(raised.value) for name in SYSTEMS)


# --- modules as torch's


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_state_dict_goes_both_ways(name):
    ours, (theirs, *_) = (make() for make in PAIRS[name])
    for source, target in ((theirs, ours), (ours, copy.deepcopy(theirs))):
        assert list(target.state_dict()) == list(source.state_dict())
        assert target.load_state_dict(source.state_dict()).missing_keys == []
        for key, value in source.state_dict().items():
            check_same(target.state_dict()[key], value)


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in WITH_WEIGHTS])
def test_nothing_in_the_state_dict(name):
    assert not PAIRS[name][0]().state_dict()


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_initialised_as_torch(name):
    initial = []
    for make in PAIRS[name]:
        torch.manual_seed(5)
        made = make()
        initial.append((made[0] if isinstance(made, tuple) else made).state_dict())
    for ours, theirs in zip(*(state.values() for state in initial), strict=True):
        check_same(ours, theirs)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_device_and_dtype(name):
    module = PAIRS[name][0](device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


ONES = {
    Conv2dBiasReLU: nn.Conv2d,
    LocalResponseNorm: nn.LocalResponseNorm,
    MaxPool2d: nn.MaxPool2d,
    Dropout: nn.Dropout,
    LinearBiasReLUDropout: nn.Linear,
}


@pytest.mark.parametrize("module", ONES)
def test_arguments_of_torch_come_first(module):
    """With torch's names, order and defaults; what is ours is keyword-only."""
    theirs = inspect.signature(ONES[module]).parameters.values()
    ours = list(inspect.signature(module).parameters.values())
    for own, other in zip(ours, theirs, strict=False):
        assert (own.name, own.default, own.kind) == (other.name, other.default, other.kind)
    assert all(own.kind is own.KEYWORD_ONLY for own in ours[len(theirs) :])
    assert issubclass(module, ONES[module])


def test_arguments_of_norm_and_pool():
    """LocalResponseNorm's, then MaxPool2d's but for return_indices."""
    ours = dict(inspect.signature(LRNMaxPool2d).parameters)
    for module in (nn.LocalResponseNorm, nn.MaxPool2d):
        for name, other in inspect.signature(module).parameters.items():
            if name != "return_indices":
                assert ours[name].default == other.default
    with pytest.raises(TypeError, match="return_indices"):
        LRNMaxPool2d(5, kernel_size=3, return_indices=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "more"),
    [
        *((PAIRS[name][0](), PAIRS[name][1]()[0], "") for name in ("conv", "norm", "pool")),
        (Dropout(0.3, True), nn.Dropout(0.3, True), ""),
        (Dropout(mode="paper"), nn.Dropout(), ", mode=paper"),
        (LinearBiasReLUDropout(5, 9, False), nn.Linear(5, 9, False), ", p=0.5"),
        (
            LinearBiasReLUDropout(5, 9, p=0.1, activation="none", mode="paper"),
            nn.Linear(5, 9),
            ", p=0.1, activation=none, mode=paper",
        ),
        (
            Conv2dBiasReLU(6, 4, 3, padding="same", activation="none"),
            nn.Conv2d(6, 4, 3, padding="same"),
            ", activation=none",
        ),
        (
            LocalResponseNorm(5, alpha_mode="sum", groups=2),
            nn.LocalResponseNorm(5),
            ", alpha_mode=sum, groups=2",
        ),
    ],
)
def test_repr(ours, theirs, more):
    assert ours.extra_repr() == theirs.extra_repr() + more
    assert repr(ours) == f"{type(ours).__name__}({ours.extra_repr()})"


def test_repr_of_norm_and_pool():
    norm, pool = nn.LocalResponseNorm(*NORM), nn.MaxPool2d(3, **POOL)
    ours = LRNMaxPool2d(*NORM, kernel_size=3, **POOL)
    assert ours.extra_repr() == f"{norm.extra_repr()}, {pool.extra_repr()}"
    ours = LRNMaxPool2d(5, kernel_size=3, alpha_mode="sum", groups=2)
    expected = f"{nn.LocalResponseNorm(5).extra_repr()}, {nn.MaxPool2d(3).extra_repr()}"
    assert ours.extra_repr() == f"{expected}, alpha_mode=sum, groups=2"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(
    "module",
    [
        Conv2dBiasReLU(6, 4, 3, padding=(0, 3, 1, 2), padding_mode="reflect", activation="none"),
        LinearBiasReLUDropout(5, 9, p=0.2, activation="none", mode="paper").eval(),
        LocalResponseNorm(5, 1e-3, alpha_mode="sum", groups=2),
        MaxPool2d(3, 2, ceil_mode=True),
        LRNMaxPool2d(5, 1e-3, kernel_size=3, stride=2, alpha_mode="sum", groups=2),
        Dropout(0.2, mode="paper").eval(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_copies_and_pickles(randn, device, duplicate, module):
    module = module.to(device)
    twin = duplicate(module)
    assert repr(twin) == repr(module)
    input = randn(*SHAPE)
    for actual, expected in zip(results(twin, input), results(module, input), strict=True):
        check_same(actual, expected)
    for own, other in zip(twin.parameters(), module.parameters(), strict=True):
        assert own is not other


@pytest.mark.parametrize("mode", ["inverted", "paper"])
@pytest.mark.parametrize("make", [Dropout, lambda **keys: LinearBiasReLUDropout(5, 9, **keys)])
def test_drops_in_training_only(randn, device, backend, make, mode):
    module = make(p=0.5, mode=mode).to(device)
    input = randn(8, 5)
    torch.manual_seed(3)
    first, second = module(input), module(input)
    torch.manual_seed(3)
    check_same(module(input), first)
    assert not torch.equal(first, second)
    module.eval()
    evaluated = module(input)
    check_same(module(input), evaluated)
    whole = module(input) if mode == "inverted" else 2 * evaluated
    kept = first != 0
    assert 0 < kept.sum() < (whole != 0).sum()
    check_same(first[kept], (2 * whole if mode == "inverted" else whole)[kept])


@pytest.mark.parametrize("make", [Dropout, lambda p: LinearBiasReLUDropout(5, 9, p=p)])
def test_seed_fixes_the_mask(randn, device, backend, make):
    module = make(p=0.5).to(device)
    input, seeds = randn(8, 5), torch.tensor([1, 2], device=device)
    first = module(input, seed=seeds[0])
    check_same(module(input, seed=seeds[0]), first)
    assert not torch.equal(module(input, seed=seeds[1]), first)


def test_dropout_inplace(randn, backend):
    input = randn(8, 5)
    assert Dropout(0.5, inplace=True)(input) is input
    assert (input == 0).any()


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_shared_weights(randn, device, backend, name):
    one, other = (PAIRS[name][0]().to(device) for _ in range(2))
    other.weight = one.weight
    input = randn(*SHAPE)
    expected = [results(module, input)[2] for module in (one, other)]
    (one(input) * gradient_like(one(input))).sum().backward()
    (other(input) * gradient_like(other(input))).sum().backward()
    check_same(one.weight.grad, sum(expected))


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_parametrized_weights(randn, device, backend, name):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    module = PAIRS[name][0]().to(device)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.weight /= 2
    parametrize.register_parametrization(module, "weight", Halved())
    input = randn(*SHAPE)
    check_same(module(input), plain(input))
    module(input).sum().backward()
    plain(input).sum().backward()
    check_same(module.parametrizations.weight.original.grad, plain.weight.grad / 2)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Conv2dBiasReLU(6, 4, 3, activation="tanh"), "'tanh'"),
        (lambda: Conv2dBiasReLU(6, 4, 3, padding_mode="mirror"), "mirror"),
        (lambda: Conv2dBiasReLU(6, 4, 3, groups=4), "groups"),
        (lambda: LocalResponseNorm(5, alpha_mode="max"), "'max'"),
        (lambda: LRNMaxPool2d(5, kernel_size=3, alpha_mode="max"), "'max'"),
        (lambda: Dropout(1.5), "1.5"),
        (lambda: Dropout(mode="scaled"), "'scaled'"),
        (lambda: LinearBiasReLUDropout(5, 9, p=-0.5), "-0.5"),
        (lambda: LinearBiasReLUDropout(5, 9, p=1.5), "1.5"),
        (lambda: LinearBiasReLUDropout(5, 9, p=math.nan), "nan"),
        (lambda: LinearBiasReLUDropout(5, 9, activation="tanh"), "'tanh'"),
        (lambda: LinearBiasReLUDropout(5, 9, mode="scaled"), "'scaled'"),
    ],
)
def test_refused_at_construction(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_is_reached_from_the_package():
    assert alexkern.nn.MaxPool2d is MaxPool2d
    assert "nn" in alexkern.__all__


def test_moved_between_calls(randn, device, backend):
    """A module follows its parameters to another dtype, layout and device, and back."""
    module = Conv2dBiasReLU(6, 4, 3, padding=1).to(device)
    image = randn(2, 6, 7, 5)
    module(image).sum().backward()
    moved = module.to(torch.bfloat16, memory_format=torch.channels_last)(image.bfloat16())
    assert moved.dtype == torch.bfloat16
    module.zero_grad()
    moved.float().sum().backward()
    assert module.weight.grad.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="should be the same"):
        module(image)
    assert copy.deepcopy(module).to("meta")(image.bfloat16().to("meta")).is_meta
    module.to(torch.float32, memory_format=torch.contiguous_format)
    expected = alexkern.ops.conv2d_bias_relu(image, module.weight, module.bias, 1, 1)
    check_same(module(image), expected)
