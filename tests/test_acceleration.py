"""Accelerated models against untouched ones: other people's, and small ones as users write them."""

import copy
import io
import math
import pickle
import random
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import UNIT, check, check_same, gradient_like, leaves
from torch import nn
from torch.nn.utils import parametrize

import alexkern
from alexkern.acceleration import Absorbed, Replaced
from alexkern.nn import (
    Conv2dBiasReLU,
    Dropout,
    LinearBiasReLUDropout,
    LocalResponseNorm,
    LRNMaxPool2d,
    MaxPool2d,
)

OURS = (Conv2dBiasReLU, Dropout, LinearBiasReLUDropout, LocalResponseNorm, LRNMaxPool2d, MaxPool2d)


def results(model, input, seed=0):
    """All outputs (auxiliary ones too) and the gradients of the input and of all parameters."""
    torch.manual_seed(seed)
    (input,) = leaves(input)
    outputs = model(input)
    outputs = [outputs] if torch.is_tensor(outputs) else [o for o in outputs if o is not None]
    wanted = [input, *model.parameters()]
    upstream = [gradient_like(output) for output in outputs]
    grads = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if grad is None else grad for grad in grads)]


def check_equal(model, twin, input):
    for actual, expected in zip(results(model, input), results(twin, input), strict=True):
        torch.testing.assert_close(actual, expected)


def check_by_rule(model, twin, input):
    """In float32, by the rule of numerics: the twin is PyTorch's own, and in float64 the truth.

    Floor: sums of K products, as in `check_conv`, with a result's largest element for all terms,
    since an element of a network's result has the errors of others in it.
    """
    twin32, twin64 = twin, copy.deepcopy(twin).double()
    length = max(p.numel() for p in model.parameters())
    truths = results(twin64, input.double())
    for index, (actual, own, truth) in enumerate(
        zip(results(model, input), results(twin32, input), truths, strict=True)
    ):
        floor = UNIT * math.sqrt(length) * truth.abs().max().expand_as(truth)
        check(f"result {index}", actual, truth, (own - truth).abs(), floor)


def replaced(report):
    return [(*item.names, item.by) for item in report.replaced]


def left(report):
    return {item.name: item.reason for item in report.left}


def without_dropping(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


# --- other people's models


def torchvision_model(name, **arguments):
    try:
        models = import_module("torchvision.models")
    except (ImportError, RuntimeError) as problem:  # RuntimeError: built for another torch
        pytest.skip(f"needs a torchvision that fits this torch: {problem}")
    torch.manual_seed(1)
    return without_dropping(getattr(models, name)(weights=None, num_classes=7, **arguments))


def vgg(*layers):
    """(conv, relu), and a pool where a layer has one: indices of torchvision's features."""
    expected, index = [], 0
    for layer in layers:
        names = [f"features.{index + i}" for i in range(1 if layer == "pool" else 2)]
        expected.append((*names, "MaxPool2d" if layer == "pool" else "Conv2dBiasReLU"))
        index += len(names)
    return expected


CONV, POOL = "conv", "pool"
HIDDEN = [
    ("classifier.0", "classifier.1", "classifier.2", "LinearBiasReLUDropout"),
    ("classifier.3", "classifier.4", "classifier.5", "LinearBiasReLUDropout"),
]
ALEXNET = [
    *vgg(CONV, POOL, CONV, POOL, CONV, CONV, CONV, POOL),
    ("classifier.0", "Dropout"),
    ("classifier.1", "classifier.2", "classifier.3", "LinearBiasReLUDropout"),
    ("classifier.4", "classifier.5", "LinearBiasReLUDropout"),
]
VGG11 = [*vgg(CONV, POOL, CONV, POOL, *(CONV, CONV, POOL) * 3), *HIDDEN]
VGG16 = [*vgg(*(CONV, CONV, POOL) * 2, *(CONV, CONV, CONV, POOL) * 3), *HIDDEN]


# Evaluation in the long run only: the graphs differ in what dropout and batch norm do.
TRAINING = [True, pytest.param(False, marks=pytest.mark.slow)]


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alexnet", ALEXNET),
        pytest.param("vgg11", VGG11, marks=pytest.mark.slow),
        pytest.param("vgg16", VGG16, marks=pytest.mark.slow),
    ],
)
def test_alexnet_and_vgg(randn, device, name, expected, training):
    model = torchvision_model(name).to(device).double().train(training)
    twin = copy.deepcopy(model)
    report = alexkern.accelerate(model)
    assert replaced(report) == expected
    assert left(report) == {"classifier.6": "no ReLU follows"}
    check_equal(model, twin, randn(2, 3, 67, 75).double())


@pytest.mark.parametrize("name", ["vgg11", "vgg16"])
def test_what_is_found_in_vgg(name):
    """The values are checked in the slow tests."""
    with torch.device("meta"):
        model = torchvision_model(name)
    assert replaced(alexkern.accelerate(model)) == (VGG11 if name == "vgg11" else VGG16)


@pytest.mark.parametrize("training", TRAINING)
def test_squeezenet(randn, device, training):
    model = torchvision_model("squeezenet1_1").to(device).double().train(training)
    twin = copy.deepcopy(model)
    report = alexkern.accelerate(model)
    fire = [
        (f"features.{i}.{part}", f"features.{i}.{part}_activation", "Conv2dBiasReLU")
        for i in (3, 4, 6, 7, 9, 10, 11, 12)
        for part in ("squeeze", "expand1x1", "expand3x3")
    ]
    assert set(replaced(report)) == {
        ("features.0", "features.1", "Conv2dBiasReLU"),
        *((f"features.{i}", "MaxPool2d") for i in (2, 5, 8)),
        *fire,
        ("classifier.0", "Dropout"),
        ("classifier.1", "classifier.2", "Conv2dBiasReLU"),
    }
    assert report.left == ()
    check_equal(model, twin, randn(2, 3, 67, 75).double())


@pytest.mark.slow
@pytest.mark.parametrize(("aux_logits", "training"), [(True, True), (False, False)])
def test_googlenet(randn, device, aux_logits, training):
    """Its convolutions are normalised before the ReLU, which is a function."""
    model = torchvision_model("googlenet", aux_logits=aux_logits, init_weights=False)
    model = model.to(device).double().train(training)
    twin = copy.deepcopy(model)
    report = alexkern.accelerate(model)
    pools = [name for name, module in twin.named_modules() if type(module) is nn.MaxPool2d]
    assert len(pools) == 13
    dropouts = ["aux1.dropout", "aux2.dropout", "dropout"] if aux_logits else ["dropout"]
    assert set(replaced(report)) == {
        *((name, "MaxPool2d") for name in pools),
        *((name, "Dropout") for name in dropouts),
    }
    convolutions = [name for name, module in twin.named_modules() if type(module) is nn.Conv2d]
    for name in convolutions:
        assert left(report)[name] == "no ReLU follows, but BatchNorm2d"
    if aux_logits:
        assert "write nn.ReLU" in left(report)["aux1.fc1"]
    check_equal(model, twin, randn(2, 3, 64, 64).double())


@pytest.mark.parametrize("training", TRAINING)
def test_resnet(randn, device, training):
    """One nn.ReLU per block, called behind additions as well."""
    model = torchvision_model("resnet18").to(device).double().train(training)
    twin = copy.deepcopy(model)
    report = alexkern.accelerate(model)
    assert replaced(report) == [("maxpool", "MaxPool2d")]
    assert len(report.left) == 21
    assert left(report)["layer4.1.conv2"] == "no ReLU follows, but BatchNorm2d"
    assert left(report)["fc"] == "no ReLU follows"
    check_equal(model, twin, randn(2, 3, 67, 75).double())


# --- small models as users write them


class Functional(nn.Module):
    """LRN as a function between modules, ReLU in place."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.drop = nn.Dropout(0.0)
        self.fc1 = nn.Linear(8 * 5 * 4, 16)
        self.relu2 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(F.local_response_norm(self.relu1(self.conv1(x)), 5, k=2.0))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        x = F.pad(x, (0, 1, 0, 1)).flatten(1)
        x = F.dropout(self.relu2(self.fc1(self.drop(x))), 0.0, self.training)
        return self.fc2(x)


FUNCTIONAL = (
    [
        ("conv1", "relu1", "Conv2dBiasReLU"),
        ("pool", "MaxPool2d"),
        ("drop", "Dropout"),
        ("fc1", "relu2", "LinearBiasReLUDropout"),
    ],
    {
        "conv2": "its ReLU is a function: write nn.ReLU as a module",
        "fc2": "no ReLU follows",
        "F.local_response_norm": "write nn.LocalResponseNorm",
        "F.max_pool2d": "alexkern.ops.max_pool2d",
        "F.dropout": "write nn.Dropout",
    },
)


class Reused(nn.Module):
    """One ReLU everywhere, a convolution called twice, a pool at two names."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU()
        self.own_relu = nn.ReLU()
        self.norm = nn.LocalResponseNorm(3, 0.1)
        self.pool = nn.MaxPool2d(2)
        self.same_pool = self.pool
        self.fc = nn.Linear(6 * 2 * 2, 5)

    def forward(self, x):
        x = self.pool(self.norm(self.relu(self.conv1(x))))
        x = self.own_relu(self.conv2(self.relu(self.conv2(x))))
        x = self.same_pool(self.norm(x))
        return self.relu(self.fc(x.flatten(1)))


REUSED = (
    [("norm", "LocalResponseNorm"), ("pool", "MaxPool2d")],
    {
        "conv1": "its ReLU, relu, is called 3 times",
        "conv2": "is called 2 times",
        "fc": "its ReLU, relu, is called 3 times",
    },
)


class Forked(nn.Module):
    """An output used twice; LRN and pool as attributes; a list besides the modules' names."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2)
        self.norm = nn.LocalResponseNorm(3, 0.1)
        self.conv2 = nn.Conv2d(6, 6, 1)
        self.relu2 = nn.ReLU(inplace=True)
        self.stages = [self.norm, self.pool, self.conv2]
        self.head = nn.Sequential(
            nn.Linear(6 * 5 * 4, 8),
            nn.ReLU(True),
            nn.Dropout(0.0),
            nn.Linear(8, 5),
            nn.Dropout(0.0),
        )

    def forward(self, x):
        before = self.conv1(x)
        x = self.relu1(before) + before
        for stage in self.stages:
            x = stage(x)
        return self.head(self.relu2(x).flatten(1))


FORKED = (
    [
        ("norm", "pool", "LRNMaxPool2d"),
        ("conv2", "relu2", "Conv2dBiasReLU"),
        ("head.0", "head.1", "head.2", "LinearBiasReLUDropout"),
        ("head.4", "Dropout"),
    ],
    {
        "conv1": "its output is used 2 times",
        "head.3": "no ReLU follows, but Dropout",
    },
)


class Branching(nn.Module):
    """Does not trace: a branch on values."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(3, 0.1),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(6, 6, 1),
        )
        self.relu = nn.ReLU()
        relu = nn.ReLU()
        self.head = nn.Sequential(
            nn.Linear(6 * 5 * 4, 8), nn.ReLU(), nn.Linear(8, 8), relu, nn.Linear(8, 8), relu
        )

    def forward(self, x):
        x = self.features(x)
        if x.sum() > 0:
            x = -x
        return self.head(self.relu(x).flatten(1))


BRANCHING = (
    [
        ("features.0", "features.1", "Conv2dBiasReLU"),
        ("features.2", "features.3", "LRNMaxPool2d"),
        ("head.0", "head.1", "LinearBiasReLUDropout"),
    ],
    {
        "the model": "does not trace (TraceError: symbolically traced variables cannot be used",
        "features.4": "nothing follows it in an nn.Sequential",
        "head.2": "its ReLU, head.3, stands at 2 names",
        "head.4": "its ReLU, head.5, stands at 2 names",
    },
)

SMALL = {
    Functional: (FUNCTIONAL, (2, 3, 11, 9)),
    Reused: (REUSED, (2, 3, 8, 8)),
    Forked: (FORKED, (2, 3, 11, 9)),
    Branching: (BRANCHING, (2, 3, 11, 9)),
}


@pytest.fixture
def seeded():
    torch.manual_seed(3)


@pytest.mark.parametrize("make", SMALL)
def test_what_is_found(make):
    (expected, reasons), _ = SMALL[make]
    report = alexkern.accelerate(make())
    assert replaced(report) == expected
    assert left(report).keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in left(report)[name]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", SMALL)
def test_small_models_by_the_rule(seeded, randn, device, backend, launches, make, training):
    model = make().to(device).train(training)
    twin = copy.deepcopy(model)
    alexkern.accelerate(model)
    check_by_rule(model, twin, randn(*SMALL[make][1]))
    assert bool(launches) == (backend == "triton")
    check_equal(model.double(), twin.double(), randn(*SMALL[make][1]).double())


@pytest.mark.parametrize("training", [True, False])
def test_drops_as_the_modules_placed_by_hand(seeded, randn, device, backend, training):
    """With equal masks: both draw their seeds from the same generator."""
    first, second = nn.Linear(20, 16), nn.Linear(16, 5)
    theirs = nn.Sequential(nn.Dropout(0.3), first, nn.ReLU(), nn.Dropout(0.5), second)
    theirs = theirs.to(device).train(training)
    by_hand = nn.Sequential(
        Dropout(0.3), LinearBiasReLUDropout(20, 16, p=0.5), nn.Identity(), nn.Identity(), second
    )
    by_hand[1].weight, by_hand[1].bias = first.weight, first.bias
    by_hand.train(training)
    input = randn(9, 20)
    evaluated = results(copy.deepcopy(theirs), input)[0]
    alexkern.accelerate(theirs)
    actual, expected = results(theirs, input), results(by_hand, input)
    for ours, hands in zip(actual, expected, strict=True):
        check_same(ours, hands)
    assert torch.equal(actual[0], results(theirs, input, seed=1)[0]) != training
    if not training:
        torch.testing.assert_close(actual[0], evaluated)


@pytest.mark.parametrize("shape", [(2, 6, 9, 7), (6, 9, 7)])
def test_norm_and_pool_without_a_batch(randn, backend, shape):
    """torch's norm takes the second dimension for channels, whatever the pool takes it for."""
    theirs = nn.Sequential(nn.LocalResponseNorm(3, 0.5), nn.MaxPool2d(3, 2))
    ours = copy.deepcopy(theirs)
    assert replaced(alexkern.accelerate(ours)) == [("0", "1", "LRNMaxPool2d")]
    check_equal(ours, theirs, randn(*shape))


# --- only what is proven


def relu_net(forward, **modules):
    """A conv, a ReLU and a forward of them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.relu = nn.ReLU()
            for name, module in modules.items():
                self.add_module(name, module)

    Net.forward = forward
    return Net()


def check_left(model, *reasons):
    before = classes(model)
    report = alexkern.accelerate(model)
    assert report.replaced == ()
    assert classes(model) == before
    assert any(all(part in reason for part in reasons) for reason in left(report).values()), report


def test_other_path_in_evaluation():
    def forward(self, x):
        return self.relu(self.conv(x)) if self.training else self.conv(x)

    check_left(relu_net(forward), "no ReLU follows")


def test_relu_alone_in_evaluation():
    def forward(self, x):
        return self.relu(self.conv(x) if self.training else x)

    check_left(relu_net(forward), "relu is also called without it")


def test_different_relus():
    def forward(self, x):
        return (self.relu if self.training else self.relu2)(self.conv(x))

    check_left(relu_net(forward, relu2=nn.ReLU()), "is followed by relu or relu2")


def test_flags_that_differ():
    """As they stand, one part in training, is a mode of its own."""

    class Part(nn.Module):
        def forward(self, x):
            return x

    def forward(self, x):
        y = self.conv(x)
        return y if self.training and not self.part.training else self.relu(y)

    model = relu_net(forward, part=Part())
    model.part.eval()
    check_left(model, "no ReLU follows")
    assert model.training
    assert not model.part.training


def test_path_without_an_optional_argument():
    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.relu(y if skip is not None else -y)

    check_left(relu_net(forward), "no ReLU follows")


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(())])
def test_path_that_is_drawn(draw):
    def forward(self, x):
        y = self.conv(x)
        return y if draw() < 0 else self.relu(y)

    def states():
        return str((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    model = relu_net(forward)
    before = states()
    check_left(model, "does not trace", "draws random numbers")
    assert states() == before


def test_draws_nothing():
    before = torch.get_rng_state()
    model = Forked()
    torch.set_rng_state(before)
    alexkern.accelerate(model)
    alexkern.restore(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_relu_of_two_names():
    def forward(self, x):
        return self.relu(self.conv(x))

    relu = nn.ReLU()
    check_left(relu_net(forward, relu=relu, other=relu), "stands at 2 names")


def test_pool_that_gives_indices():
    model = nn.Sequential(nn.LocalResponseNorm(3), nn.MaxPool2d(2, return_indices=True))
    report = alexkern.accelerate(model)
    assert replaced(report) == [("0", "LocalResponseNorm"), ("1", "MaxPool2d")]


def test_leaves_the_model_as_it_was_while_tracing():
    def forward(self, x):
        self.last = self.conv(x)
        self.count += 1
        return self.relu(self.last)

    model = relu_net(forward)
    model.register_buffer("count", torch.zeros(()))
    model.last = None
    alexkern.accelerate(model)
    assert model.last is None
    assert model.count == 0


@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_forward_hook(lambda *_: hook()),
        lambda module, hook: module.register_forward_pre_hook(lambda *_: hook()),
        lambda module, hook: module.register_full_backward_hook(lambda *_: hook()),
        lambda module, hook: module.register_full_backward_pre_hook(lambda *_: hook()),
    ],
)
@pytest.mark.parametrize("place", ["0", "1", "2", "3"])
def test_hooks(register, place):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout())
    called = []
    register(model.get_submodule(place), lambda: called.append(1))
    report = alexkern.accelerate(model)
    assert not called
    assert replaced(report) == [
        *([] if place in "01" else [("0", "1", "Conv2dBiasReLU")]),
        *([] if place == "2" else [("2", "MaxPool2d")]),
        *([] if place == "3" else [("3", "Dropout")]),
    ]
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    assert called
    if place != "1":  # where the convolution says why
        assert "has hooks" in left(report)[place]


def test_hook_between_two_parts():
    """It sees what the first part gives, which ends before the ReLU."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    check_left(model, "its output is used 2 times")
    assert not seen
    model(torch.randn(1, 3, 4, 4))
    assert (seen[0] < 0).any()


def test_parametrizations():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    check_left(model, "is parametrized")


def test_subclasses():
    class Own(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class OwnReLU(nn.ReLU):
        pass

    check_left(nn.Sequential(Own(3, 4, 1), nn.ReLU()), "is of class Own, which")
    check_left(nn.Sequential(nn.Conv2d(3, 4, 1), OwnReLU()), "its ReLU, 1, is of class OwnReLU")


def test_forward_of_its_own():
    model = nn.Sequential(nn.MaxPool2d(2))
    model[0].forward = lambda x: x
    check_left(model, "has a forward of its own")


def test_no_candidates_are_not_reported():
    model = nn.Sequential(nn.Dropout2d(), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.Conv1d(3, 3, 1))
    report = alexkern.accelerate(model)
    assert (report.replaced, report.left) == ((), ())


@pytest.mark.parametrize("make", [lambda: nn.MaxPool2d(2), nn.Dropout])
def test_model_of_one_layer(make):
    module = make()
    name = type(module).__name__
    assert replaced(alexkern.accelerate(module)) == [("the model", name)]
    assert type(module).__module__ == "alexkern.nn"
    alexkern.restore(module)
    assert type(module) is type(make())
    check_left(nn.Linear(2, 2), "is not called")


def test_layer_that_pads_and_has_no_bias(randn, backend):
    keys = {"padding": "same", "padding_mode": "circular", "bias": False}
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **keys), nn.ReLU()).double()
    twin = copy.deepcopy(model)
    assert alexkern.accelerate(model).replaced
    check_equal(model, twin, randn(2, 3, 5, 4).double())


def test_who_asks_for_classes(randn):
    """As code that gathers what each ReLU gives."""

    class Net(nn.Module):
        def __init__(self, is_relu):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
            self.is_relu = is_relu

        def forward(self, x):
            gathered = 0.0
            for module in self.body:
                x = module(x)
                if self.is_relu(module):
                    gathered = gathered + x.sum()
            return gathered

    model = Net(lambda module: isinstance(module, nn.ReLU))
    twin = copy.deepcopy(model)
    assert len(alexkern.accelerate(model).replaced) == 2
    check_equal(model, twin, randn(2, 3, 5, 4))
    check_left(Net(lambda module: type(module) is nn.ReLU), "when the classes of its modules")


def test_forward_of_the_object():
    model = relu_net(lambda self, x: self.relu(self.conv(x)))
    model.forward = lambda x: model.conv(x)
    check_left(model, "does not trace", "its forward is not that of its class")


def test_dropout_by_itself(randn):
    """As who samples with dropout in evaluation does, and who sets p during training."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Dropout()).eval()
    assert len(alexkern.accelerate(model).replaced) == 1
    input = randn(5, 20)
    whole = model(input)
    check_same(model(input), whole)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(input), model(input))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin[2].p = 1.0
        assert not twin(input).any()
        assert "p=1.0" in repr(twin[0])
        twin[2].p = 0.0
        check_same(twin(input), whole)
    alexkern.restore(model)
    assert model[2].training
    assert not model[0].training


@pytest.mark.parametrize("traces", [True, False])
def test_dropout_written_to_in_place(randn, traces):
    """torch allows it, and the one that keeps its output for backward does not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            last = [] if traces else [nn.ELU(inplace=True)]
            self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), *last)

        def forward(self, x):
            x = self.body(x)
            if not traces and x.sum() < -100:
                raise ValueError
            return x.mul_(2) if traces else x

    model = Net()
    report = alexkern.accelerate(model)
    assert replaced(report)[0] == ("body.0", "body.1", "LinearBiasReLUDropout")
    assert replaced(report)[1] == ("body.2", "Dropout")
    results(model, randn(5, 3))  # raises if what backward needs was written to


@pytest.mark.parametrize("thing", [None, nn.Conv2d, "model"])
@pytest.mark.parametrize("name", ["accelerate", "restore"])
def test_takes_modules_only(name, thing):
    with pytest.raises(TypeError, match=type(thing).__name__):
        getattr(alexkern, name)(thing)


# --- the model stays the model


def test_state_dict_and_objects_stay():
    model = Forked()
    modules, state = dict(model.named_modules()), model.state_dict()
    parameters = dict(model.named_parameters())
    alexkern.accelerate(model)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert all(model.get_parameter(name) is value for name, value in parameters.items())
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == state[name].data_ptr()
        check_same(value, state[name])


def test_again_changes_nothing():
    model = Functional()
    first = alexkern.accelerate(model)
    before = repr(model), classes(model)
    second = alexkern.accelerate(model)
    assert second.replaced == ()
    assert set(second.left) <= set(first.left)
    assert (repr(model), classes(model)) == before


@pytest.mark.parametrize("make", SMALL)
def test_restore(make):
    model = make()
    modules = {name: (module, dict(module.__dict__)) for name, module in model.named_modules()}
    before = repr(model), classes(model)
    alexkern.restore(model)
    assert (repr(model), classes(model)) == before
    alexkern.accelerate(model)
    assert classes(model) != before[1]
    alexkern.restore(model)
    assert (repr(model), classes(model)) == before
    for name, (module, attributes) in modules.items():
        assert model.get_submodule(name) is module
        assert module.__dict__ == attributes
    assert alexkern.accelerate(model).replaced


def test_restore_keeps_what_happened_since(randn):
    """Loaded parameters, flags, dtype."""
    model = Forked()
    other = Forked().double()
    alexkern.accelerate(model)
    model.load_state_dict(other.state_dict(), assign=True)
    model.conv2.eval()
    model.head.requires_grad_(False)
    alexkern.restore(model)
    assert not model.conv2.training
    assert model.training
    assert not model.head[0].weight.requires_grad
    model.head.requires_grad_(True)
    check_equal(model, other, randn(2, 3, 11, 9).double())


def test_restore_refuses_what_has_another_class():
    model = Forked()
    alexkern.accelerate(model)
    parametrize.register_parametrization(model.conv2, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="conv2 has become a ParametrizedConv2dBiasReLU"):
        alexkern.restore(model)
    assert isinstance(model.norm, LRNMaxPool2d)
    parametrize.remove_parametrizations(model.conv2, "weight")
    alexkern.restore(model)
    assert type(model.conv2) is nn.Conv2d


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
@pytest.mark.parametrize("make", SMALL)
def test_copies(randn, device, make, duplicate):
    model = make().to(device)
    untouched = classes(model)
    alexkern.accelerate(model)
    twin = duplicate(model)
    assert classes(twin) == classes(model)
    input = randn(*SMALL[make][1])
    for actual, expected in zip(results(twin, input), results(model, input), strict=True):
        check_same(actual, expected)
    alexkern.restore(twin)
    assert classes(twin) == untouched
    assert classes(model) != untouched
    check_equal(twin, model, input)


def test_optimizer_made_before_trains_on(randn, device):
    model = Forked().to(device)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    alexkern.accelerate(model)
    for step in range(3):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            one(randn(2, 3, 11, 9, seed=step)).square().sum().backward()
            optimizer.step()
        if step == 1:
            alexkern.restore(model)
    initial = copy.deepcopy(twin)
    for own, other in zip(model.parameters(), initial.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert not any(type(module) in OURS for module in model.modules())


def test_flags_of_each_module_stay():
    model = Forked()
    model.conv2.eval()
    model.head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    alexkern.accelerate(model)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_part_of_a_model():
    model = Forked()
    alexkern.accelerate(model.head)
    assert isinstance(model.head[0], LinearBiasReLUDropout)
    assert type(model.norm) is nn.LocalResponseNorm
    alexkern.accelerate(model)
    alexkern.restore(model.head)
    assert type(model.head[0]) is nn.Linear
    assert type(model.conv2) is Conv2dBiasReLU


def test_what_is_shown():
    model = Forked()
    report = alexkern.accelerate(model)
    assert isinstance(model.relu2, Absorbed)
    assert repr(model.relu2) == "AbsorbedReLU(inplace=True)"
    assert repr(model.norm).startswith("LRNMaxPool2d(3, alpha=0.1")
    assert report.replaced[0] == Replaced(("norm", "pool"), "LRNMaxPool2d")
    assert str(report).splitlines() == [
        "replaced: 4",
        "  LRNMaxPool2d           norm, pool",
        "  Conv2dBiasReLU         conv2, relu2",
        "  LinearBiasReLUDropout  head.0, head.1, head.2",
        "  Dropout                head.4",
        "left: 2",
        "  conv1: its output is used 2 times",
        "  head.3: no ReLU follows, but Dropout",
    ]


def test_many_names_are_cut_short():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    lines = str(alexkern.accelerate(model)).splitlines()
    assert "  0, 1, 2 and 5 more: no ReLU follows, but Linear" in lines


def test_is_reached_from_the_package():
    from alexkern import acceleration

    assert alexkern.accelerate is acceleration.accelerate
    assert alexkern.restore is acceleration.restore
    assert {"accelerate", "restore"} <= set(alexkern.__all__)
