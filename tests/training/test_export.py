import pytest
import torch
from small_runs import newest, small_trainer, train

from alexkern.cli import main
from alexkern.files import save_torch
from alexkern.models import alexnet, load_weights


def test_a_run_s_weights_go_into_a_new_network(tmp_path, capsys):
    trainer = train(small_trainer(), 5, tmp_path)
    output = tmp_path / "weights.safetensors"
    assert main(["export", str(tmp_path / "best.pt"), str(output)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {output}: preset mini, 3 classes\n")
    model = alexnet("mini", 3)
    load_weights(model, output)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.slow
def test_owt_goes_to_torchvision(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    trainer = train(small_trainer(), 1, tmp_path)
    state = newest(tmp_path)
    ours = alexnet("owt", 3).eval()
    state["options"]["preset"], state["model"] = "owt", ours.state_dict()
    save_torch(state, tmp_path / "owt.pt")
    assert trainer.step == 1
    assert main(["export", str(tmp_path / "owt.pt"), str(tmp_path / "owt.pth")]) == 0
    theirs = torchvision.models.alexnet(num_classes=3).eval()
    theirs.load_state_dict(torch.load(tmp_path / "owt.pth", weights_only=True))
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["none.pt", "w.safetensors"], "no checkpoint at none.pt"),
        (["best.pt", "w.bin"], "written to a .safetensors file, got 'w.bin'"),
        (["best.pt", "w.pth"], "torchvision's alexnet is preset 'owt'"),
    ],
)
def test_what_cannot_be_exported(tmp_path, monkeypatch, capsys, given, words):
    train(small_trainer(), 5, tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["export", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("alexkern: ")
    assert words in error
    assert error.count("\n") == 1
