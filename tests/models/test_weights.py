"""Weights in and out: round trips, the files of others, and what is refused."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alexkern.models import (
    PRESETS,
    AlexNet,
    alexnet,
    load_weights,
    save_weights,
    torchvision_state_dict,
)


def tiny(name: str = "mini", num_classes: int = 4) -> AlexNet:
    """The preset with few channels and units."""
    preset = PRESETS[name]
    widths = tuple(min(width, 8) for width in preset.widths)
    return AlexNet(replace(preset, widths=widths, fc_widths=(16, 8), weight_std=None), num_classes)


def check_equal(first: nn.Module, second: nn.Module) -> None:
    assert list(first.state_dict()) == list(second.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("name", ["mini", "conv6", "no_exchange", "minus_conv3", "owt"])
def test_round_trip(name, file):
    first, second = tiny(name), tiny(name)
    save_weights(first, file)
    load_weights(second, str(file))
    check_equal(first, second)
    assert list(file.parent.iterdir()) == [file]
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert len(metadata.pop("sha256")) == 64
    assert metadata == {"format": "pt", "preset": name, "classes": "4"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_layout_stay_the_models(dtype, file):
    first = tiny().to(dtype, memory_format=torch.channels_last)
    save_weights(first, file)
    same, float32 = tiny().to(dtype), tiny().to(memory_format=torch.channels_last)
    load_weights(same, file)
    check_equal(first, same)
    load_weights(float32, file)
    assert float32.conv2.weight.dtype == torch.float32
    assert float32.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    check_equal(float32, first.float())


def torchvision_alexnet(num_classes: int) -> nn.Module:
    pytest.importorskip("torchvision")
    try:
        from torchvision.models import alexnet as theirs
    except RuntimeError as error:
        pytest.skip(f"torchvision does not fit this torch: {error}")
    return theirs(weights=None, num_classes=num_classes)


def test_torchvision_both_ways(tmp_path):
    """Its file of weights into `owt`, and `owt` into its network: equal logits."""
    theirs, ours = torchvision_alexnet(5).eval(), alexnet("owt", 5).eval()
    torch.save(theirs.state_dict(), tmp_path / "alexnet-owt.pth")
    load_weights(ours, tmp_path / "alexnet-owt.pth")
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x))
    back = torchvision_state_dict(ours)
    assert list(back) == list(theirs.state_dict())
    nn.init.constant_(ours.conv3.bias, 1)
    theirs.load_state_dict(torchvision_state_dict(ours))
    torch.testing.assert_close(theirs(x), ours(x))


def test_only_owt_is_torchvisions():
    with pytest.raises(ValueError, match=r"'owt', the model is 'paper' with 4 classes"):
        torchvision_state_dict(tiny("paper"))


def test_state_dicts_and_checkpoints(tmp_path):
    first = tiny()
    state = first.state_dict()
    for source in (state, dict(state)):
        second = tiny()
        load_weights(second, source)
        check_equal(first, second)
    torch.save({"model": state, "options": {"preset": "mini"}, "step": 3}, tmp_path / "c.pt")
    third = tiny()
    load_weights(third, tmp_path / "c.pt")
    check_equal(first, third)


def test_new_head(file):
    """Everything but fc8, whatever the number of classes, and without fc8 in the file."""
    source = tiny(num_classes=4)
    save_weights(source, file)
    headless = {name: t for name, t in source.state_dict().items() if "fc8" not in name}
    for classes, given in ((7, file), (4, file), (7, headless)):
        model = tiny(num_classes=classes)
        head = model.fc8.weight.clone()
        load_weights(model, given, new_head=True)
        assert torch.equal(model.fc8.weight, head)
        model.fc8 = source.fc8
        check_equal(source, model)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: without(state, "conv2.bias"),
            r"the state dict does not fit 'mini' with 4 classes: conv2\.bias is missing",
        ),
        (
            lambda state: {**state, "conv6.bias": torch.ones(3)},
            r"conv6\.bias is unknown",
        ),
        (
            lambda state: {**state, "conv1.bias": torch.ones(3)},
            r"conv1\.bias is \[3\] instead of \[8\]",
        ),
        (
            lambda state: {**state, "conv1.bias": torch.ones(8, dtype=torch.int64)},
            r"conv1\.bias is \[8\] of torch\.int64 instead of \[8\]",
        ),
        (lambda state: {**state, "conv1.bias": "text"}, r"conv1\.bias is a str instead of \[8\]"),
        (
            lambda state: {"model": state, "optimizer": {}},
            r"conv1\.weight is missing; conv1\.bias is missing; conv2\.weight is missing; "
            "and 15 more$",
        ),
        (
            lambda state: {**state, "fc8.weight": torch.ones(9, 8), "fc8.bias": torch.ones(9)},
            r"fc8\.weight is \[9, 8\] instead of \[4, 8\]; fc8\.bias is \[9\] instead of \[4\] "
            r"\(new_head=True, or --new-head, keeps the model's own fc8\)$",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, message):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {name: tensor + 1 for name, tensor in before.items()}
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, change(given))
    assert "\n" not in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_of_another_preset(tmp_path, file):
    """The shapes of `paper` and `krizhevsky2012` are equal: only the file knows."""
    source, model = tiny("paper"), tiny("krizhevsky2012")
    save_weights(source, file)
    torch.save({"model": source.state_dict(), "options": {"preset": "paper"}}, tmp_path / "c.pt")
    message = r"preset 'paper', the model is 'krizhevsky2012': make it with alexnet\('paper'"
    for path in (file, tmp_path / "c.pt"):
        with pytest.raises(ValueError, match=message):
            load_weights(model, path)
    load_weights(model, source.state_dict())  # who gives tensors knows


def test_any_flipped_bit_is_found(file):
    """Or it is where it changes no weight, such as the number of classes."""
    source = tiny()
    save_weights(source, file)
    content = file.read_bytes()
    positions = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    messages = []
    for position in (
        *positions.sample(range(header), 100),
        *positions.sample(range(header, len(content)), 100),
    ):
        changed = bytearray(content)
        changed[position] ^= 1 << positions.randrange(8)
        file.write_bytes(changed)
        model = tiny()
        try:
            load_weights(model, file)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert position < header
            check_equal(source, model)
    assert len(messages) >= 150
    assert not any("\n" in message for message in messages)


def test_a_file_without_a_digest_is_taken(file):
    """Of another program, which writes no metadata of ours."""
    source, model = tiny(), tiny()
    save_file(source.state_dict(), file)
    load_weights(model, file)
    check_equal(source, model)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"\x80\x02}q\x00."], ids=["empty", "html", "pickle"]
)
def test_unreadable_files_are_one_line(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_weights(tiny(), path)
    assert "\n" not in str(error.value)


def test_truncated_files_are_refused(file):
    save_weights(tiny(), file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(tiny(), file)


def test_no_code_is_run(tmp_path):
    torch.save({"model": Path("/")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth is not a readable file of weights"):
        load_weights(tiny(), tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_weights(tiny(), tmp_path / "w.pth")


def test_missing_files_and_packages(file, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file of weights at"):
        load_weights(tiny(), file)
    with pytest.raises(ValueError, match=r"written to a \.safetensors file, got 'w\.pt'"):
        save_weights(tiny(), "w.pt")
    save_weights(tiny(), file)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_weights, load_weights):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call(tiny(), file)


def test_a_failed_save_leaves_the_old_file(file, monkeypatch):
    save_weights(tiny(), file)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(tiny(), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
