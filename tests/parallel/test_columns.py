"""A network in columns and replicas is the network in one process."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ranks import in_processes
from torch import Tensor

import alexkern
from alexkern.models import AlexNet
from alexkern.models.presets import PRESETS, Preset, ResponseNorm
from alexkern.parallel import Axis, Mesh, gathered, make_mesh, replicated
from alexkern.parallel.exchange import _Exchange

CPU = torch.device("cpu")


def small(name: str) -> Preset:
    """The same topology on small images, with few units; dropout as it is.

    Normalisations are strong, for maps of other columns to matter.
    """
    preset = PRESETS[name]
    norm = preset.response_norm and replace(preset.response_norm, alpha=1.0)
    widths = tuple(min(width, 8) for width in preset.widths)
    shape = {"conv1_kernel": 5, "conv1_stride": 2, "conv1_padding": (0, 1, 0, 1), "crop_size": 32}
    numbers = {"widths": widths, "fc_widths": (16, 8), "weight_std": None, "ceil_mode": False}
    numbers["response_norm"] = norm
    return replace(preset, **{**shape, **numbers})


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return pixels.contiguous(memory_format=torch.channels_last), torch.arange(count) % 5


def gradients(model: AlexNet, mesh: Mesh, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of this process's share of a batch."""
    like = model.fc6.weight
    pixels, labels = images(count)
    pixels, labels = pixels.to(like.device, like.dtype), labels.to(like.device)
    rows = mesh.data.portion(range(count))
    own = mesh.columns.portion(rows) if mesh.hybrid else rows
    seeds = torch.tensor([3, 4], device=like.device)
    layers = dict(model.named_children())
    convolutions = {name: each for name, each in layers.items() if name.startswith("conv")}
    rest = {name: each for name, each in layers.items() if name not in convolutions}
    features = replicated(model.features, convolutions, mesh.convolution_replicas)
    classify = replicated(model.classify, rest, mesh.data)
    logits = classify(features(pixels[own.start : own.stop]), seeds, rows)
    wanted = labels[rows.start : rows.stop]
    here = logits.shape[1] > 0
    loss = F.cross_entropy(logits, wanted, reduction="sum") / count if here else logits.sum()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), loss.detach(), found


def in_parts(presets: list[Preset], columns: int, hybrid: bool, count: int) -> list:
    """In one of several processes: its place, and what it computes of each."""
    found = []
    mesh = make_mesh(columns, hybrid, CPU)
    for preset in presets:
        torch.manual_seed(0)
        with alexkern.use_backend("torch"):
            model = AlexNet(preset, 5, mesh).double()
            found.append(gradients(model, mesh, count))
    return [(mesh.data.index, mesh.columns.index), found]


@pytest.mark.parametrize(
    ("processes", "columns", "hybrid"),
    [
        (2, 2, False),
        (2, 1, False),
        (2, 2, True),
        (4, 2, False),
        (4, 2, True),
        (4, 4, False),
        (4, 4, True),
    ],
)
def test_columns_and_replicas_are_the_network(processes, columns, hybrid):
    """Logits and every gradient, with dropout, of a batch that does not divide evenly."""
    names = ["paper", "krizhevsky2012", "owt", "no_exchange", "exchange_all", "minus_conv3"]
    presets = [small(name) for name in (names[:2] if processes > 2 else names)]
    if processes == 2:  # a window that reaches further to one side
        norm = replace(ResponseNorm(), size=4, alpha=1.0)
        presets.append(replace(presets[0], response_norm=norm))
    if columns == 4:  # those between others have borders on both sides
        presets = [small("owt"), replace(small("one_gpu"), widths=(16, 16, 8, 8, 8))]
    count = 7
    results = in_processes(processes, in_parts, presets, columns, hybrid, count)
    for number, preset in enumerate(presets):
        torch.manual_seed(0)
        model = AlexNet(preset, 5).double()
        with alexkern.use_backend("torch"):
            logits, loss, exact = gradients(model, Mesh(), count)
        parts = {place: found[number] for place, found in results}
        replicas = processes // columns
        first = [parts[replica, 0] for replica in range(replicas)]
        torch.testing.assert_close(torch.cat([each[0] for each in first]), logits)
        torch.testing.assert_close(sum(each[1] for each in first), loss)
        for name, gradient in exact.items():
            assert gradient.abs().max() > 0, name
            for replica in range(replicas):
                holders = [parts[replica, column][2] for column in range(columns)]
                rows = [held[name] for held in holders if name in held]
                if hybrid and name.startswith("conv"):
                    for each in rows:
                        torch.testing.assert_close(each, gradient)
                else:
                    torch.testing.assert_close(torch.cat(rows), gradient)


def rounded(columns: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    mesh = make_mesh(columns, False, CPU)
    model = AlexNet(small("krizhevsky2012"), 5, mesh, torch.float16).double()
    with alexkern.use_backend("torch"):
        logits, _, found = gradients(model, mesh, 4)
    return logits, found


def test_what_crosses_is_rounded_alike_in_any_number_of_columns():
    """Values to the same half-precision numbers; gradients in parts, each to half precision."""
    (exact, wanted), *_ = in_processes(1, rounded, 1)
    (logits, first), (_, second) = in_processes(2, rounded, 2)
    torch.testing.assert_close(logits, exact)
    for name, gradient in wanted.items():
        rows = torch.cat([part[name] for part in (first, second) if name in part])
        error, largest = (rows - gradient).abs().max(), gradient.abs().max()
        # behind a seam two parts and their sum are rounded, 2**-11 each, at most four seams deep
        assert error <= 12 * 2**-11 * largest, name
    torch.manual_seed(0)
    with alexkern.use_backend("torch"):
        model = AlexNet(small("krizhevsky2012"), 5).double()
        plain, _, unrounded = gradients(model, Mesh(), 4)
    difference = (plain - exact).abs().max() / plain.abs().max()
    assert 1e-6 < difference < 2**-9
    for name, gradient in unrounded.items():  # a unit may change sides at 0
        error, largest = (wanted[name] - gradient).abs().max(), gradient.abs().max()
        assert 0 < error < 0.1 * largest, (name, error / largest)


def small_gradient() -> Tensor:
    """Of units that two columns see, a millionth in both."""
    axis = make_mesh(2, False, CPU).columns
    part = torch.ones(1, 4, requires_grad=True)
    (1e-6 * gathered(part, axis, 1, [4, 4], torch.float16)).sum().backward()
    return part.grad


def test_small_gradients_cross_in_half_precision():
    """A millionth is no normal number of float16."""
    expected = torch.full((1, 4), 2e-6)
    for found in in_processes(2, small_gradient):
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=0)


def order_of_events() -> tuple[int, list[str]]:
    """Of layer 1 in one of two columns: messages, and the normalisation of its own maps."""
    events: list[str] = []
    begin, end, normalise = _Exchange.begin, _Exchange.end, AlexNet._normalise_own

    def logged(name, function):
        def call(*arguments):
            events.append(name)
            return function(*arguments)

        return call

    def own(model, maps, *arguments):
        output = normalise(model, maps, *arguments)
        if maps.shape[1] == 4:  # not the few at a border
            events.append("forward")
            output.register_hook(lambda _: events.append("backward"))
        return output

    _Exchange.begin, _Exchange.end = logged("begin", begin), logged("end", end)
    AlexNet._normalise_own = own
    torch.manual_seed(0)
    mesh = make_mesh(2, False, CPU)
    model = AlexNet(replace(small("paper"), fc_widths=(16, 8)), 5, mesh).double()
    with alexkern.use_backend("torch"):
        gradients(model, mesh, 2)
    return mesh.columns.index, events


def test_maps_at_the_border_travel_while_the_others_are_normalised():
    for _, events in in_processes(2, order_of_events):
        whole = ["begin", "forward", "end", "begin", "forward", "end"]  # layers 1 and 2
        assert events[:6] == whole
        back = ["begin", "backward", "end", "begin", "backward", "end"]
        assert events[-6:] == back


@pytest.mark.parametrize(
    ("changes", "columns", "words"),
    [
        ({}, 3, "conv1 has 8 maps or units in 1 groups"),
        ({}, 4, "conv2 has 8 maps or units in 2 groups"),
        ({"widths": (4, 8, 8, 8, 8)}, 2, "conv1 has 2 maps in each, and .* size 5 needs 4"),
        ({"fc_widths": (16, 9)}, 2, "fc7 has 9 maps or units in 1 groups"),
    ],
)
def test_what_does_not_divide_is_refused(changes, columns, words):
    with pytest.raises(ValueError, match=words):
        AlexNet(replace(small("paper"), **changes), 5, Mesh(columns=Axis(0, columns)))
