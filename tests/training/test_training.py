import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexkern.data import Dataset, Split
from alexkern.data.colours import principal_colours
from alexkern.training import checkpoint
from alexkern.training.cli import INTERPRETED_STEPS, main
from alexkern.training.errors import DivergedError, UsageError
from alexkern.training.loop import Trainer, learning_rate
from alexkern.training.metrics import Meter, wrong_answers
from alexkern.training.options import resolve

ROOT = Path(__file__).parents[2]
COLUMNS = [
    *("step", "epoch", "train_loss", "train_top1_error"),
    *("val_loss", "val_top1_error", "val_top5_error"),
    *("learning_rate", "images_per_second", "data_wait_share"),
]


def small_dataset(classes: int = 3) -> Dataset:
    """Noise on red, green, blue or grey: 40 images to train on and 10 held out."""
    images = np.random.default_rng(0).integers(0, 150, (50, 36, 36, 3), np.uint8)
    labels = np.arange(50) % classes
    images += (100 * np.eye(4, 3, dtype=np.uint8))[labels][:, None, None]
    names = tuple(f"class {label}" for label in range(classes))
    train, val = Split(images[:40], labels[:40]), Split(images[40:], labels[40:])
    mean, colours = images[:40].mean(0, dtype=np.float32), principal_colours(np.eye(3))
    return Dataset("colours", names, train, val, True, mean, colours)


def small_trainer(dataset: Dataset | None = None, **given) -> Trainer:
    """Five steps an epoch, three epochs, on the CPU, where sums have one order."""
    chosen = {"preset": "mini", "batch_size": 8, "epochs": 3, "workers": 0, "print_freq": 2}
    options = resolve({**chosen, **given}, {})
    return Trainer(options, dataset or small_dataset(), torch.device("cpu"))


def train(trainer: Trainer, steps: int, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer.train(steps, folder)
    return trainer


def assert_same(first: Trainer, second: Trainer) -> None:
    """The same step, and the same bits in weights and velocities."""
    one, other = first.state_dict(), second.state_dict()
    assert one["step"] == other["step"]
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    for index, state in one["optimizer"]["state"].items():
        assert torch.equal(state["velocity"], other["optimizer"]["state"][index]["velocity"])


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# The parts


def test_learning_rate_drops_at_the_epochs_of_the_2012_code():
    rates = [learning_rate(0.01, step, 90 * 7) for step in range(90 * 7)]
    changes = [step for step in range(1, 90 * 7) if rates[step] != rates[step - 1]]
    assert changes == [25 * 7, 51 * 7, 79 * 7]
    assert [rates[step] for step in (0, *changes)] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])


def test_wrong_answers():
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.4, 0.3], [0.0, 1.0, 2.0]])
    labels = torch.tensor([1, 2, 1])
    assert [wrong_answers(logits, labels, k).item() for k in (1, 2, 3, 5)] == [2, 1, 0, 0]


def test_meter_weighs_batches_by_their_images():
    meter = Meter(torch.device("cpu"))
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    meter.add(torch.tensor(1.0), right.expand(3, 2), torch.zeros(3, dtype=torch.int64))
    meter.add(torch.tensor(5.0), wrong, torch.zeros(1, dtype=torch.int64))
    measured = meter.read()
    assert (measured.train_loss, measured.train_top1_error, measured.images) == (2.0, 0.25, 4)
    meter.add(torch.tensor(7.0), right, torch.zeros(1, dtype=torch.int64))
    assert meter.read().train_loss == 7.0


def test_options_come_from_command_line_then_checkpoint_then_preset():
    saved = {"data": "digits", "preset": "mini", "lr": 0.5, "seed": 4}
    options = resolve({"lr": 0.25}, saved)
    assert (options.lr, options.seed, options.batch_size) == (0.25, 4, 32)
    assert resolve({}, {}).preset == "mini"
    assert resolve({"data": "synthetic"}, {}).preset == "paper"
    paper = resolve({"data": "/images"}, {})
    assert (paper.preset, paper.epochs, paper.batch_size, paper.lr) == ("paper", 90, 128, 0.01)


# Checkpoints


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    trainer = small_trainer()
    checkpoint.save(path, trainer.state_dict())
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, trainer.state_dict())
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"garbage", "half", "foreign", "code"])
def test_unusable_checkpoints_are_one_line(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if content == "half":
        checkpoint.save(path, small_trainer().state_dict())
        path.write_bytes(path.read_bytes()[:1000])
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "code":
        torch.save({"options": Path("/")}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"checkpoint\.pt") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


# The loop


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_network_is_evaluated_on_centres_less_the_mean_of_centres(amp):
    dataset, seen = small_dataset(), []
    trainer = small_trainer(dataset, amp=amp)
    trainer.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    trainer.evaluate()
    inputs = torch.cat(seen)
    images = dataset.val.images[np.arange(10)].astype(np.float64)
    centres = (images - dataset.mean)[:, 2:34, 2:34].transpose(0, 3, 1, 2) / 64
    assert inputs.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)
    eps = torch.finfo(inputs.dtype).eps
    np.testing.assert_allclose(inputs.double().numpy(), centres, rtol=eps, atol=1e-6)


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [("triton", (12, 17, 17)), ("torch", (3, 32, 32)), ("auto", (3, 32, 32))],
)
def test_the_kernels_are_given_packed_images(kernels, shape, tmp_path):
    """In training and in evaluation."""
    seen = []
    trainer = small_trainer(kernels=kernels)

    def stop(_, arguments):
        seen.append(tuple(arguments[0].shape[1:]))
        raise InterruptedError

    trainer.model.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        trainer.evaluate()
    with pytest.raises(InterruptedError):
        trainer.train(1, tmp_path)
    assert seen == [shape, shape]


@pytest.mark.parametrize("stop", [5, 8], ids=["at an epoch's end", "in an epoch"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop):
    through = train(small_trainer(), 12, tmp_path / "through")
    train(small_trainer(), stop, tmp_path / "parts")
    resumed = small_trainer()
    resumed.load_state_dict(checkpoint.load(tmp_path / "parts" / "checkpoint.pt"))
    assert resumed.step == stop
    train(resumed, 12, tmp_path / "parts")
    assert_same(through, resumed)
    ends = [(row["step"], row["val_loss"]) for row in rows(tmp_path / "through")]
    resumed_ends = [(row["step"], row["val_loss"]) for row in rows(tmp_path / "parts")]
    assert [end for end in ends if end[1]] == [
        end for end in resumed_ends if end[1] and end[0] != "8"
    ]


def test_workers_change_no_bit(tmp_path):
    alone = train(small_trainer(), 6, tmp_path / "alone")
    helped = train(small_trainer(workers=2), 6, tmp_path / "helped")
    assert_same(alone, helped)


def test_rows_after_the_checkpoint_are_written_anew(tmp_path):
    train(small_trainer(), 5, tmp_path)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    train(small_trainer(), 8, tmp_path)
    resumed = small_trainer()
    resumed.load_state_dict(saved)
    train(resumed, 10, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "5", "6", "8", "10"]


def test_metrics_have_their_columns_and_an_evaluation_at_each_end(tmp_path):
    trainer = train(small_trainer(lr=0.01), 8, tmp_path)
    written = rows(tmp_path)
    assert list(written[0]) == COLUMNS
    assert [(row["step"], row["epoch"]) for row in written] == [
        *(("2", "1"), ("4", "1"), ("5", "1")),
        *(("6", "2"), ("8", "2")),
    ]
    assert [bool(row["val_loss"]) for row in written] == [False, False, True, False, True]
    for row in written:
        assert 0 <= float(row["train_top1_error"]) <= 1
        assert 0 <= float(row["data_wait_share"]) <= 1
        assert float(row["images_per_second"]) > 0
    # 28 % of 15 steps is 4.2: the rate falls for the sixth step.
    assert [float(row["learning_rate"]) for row in written] == pytest.approx(
        [0.01] * 3 + [1e-3] * 2
    )
    evaluation = trainer.evaluate()
    assert float(written[-1]["val_loss"]) == pytest.approx(evaluation.loss, rel=1e-6)
    assert float(written[-1]["val_top5_error"]) == 0  # three classes


def test_evaluation_is_of_the_held_out_images():
    trainer = small_trainer()
    dataset = small_dataset()
    trainer.model.eval()
    pixels = dataset.val.images[:, 2:34, 2:34].astype(np.float32) - dataset.mean[2:34, 2:34]
    with torch.inference_mode():
        logits = trainer.model(torch.from_numpy(pixels / 64).permute(0, 3, 1, 2))
    labels = torch.from_numpy(dataset.val.labels)
    evaluation = trainer.evaluate()
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert evaluation.loss == pytest.approx(expected, rel=1e-5)
    wrong = (logits.argmax(1) != labels).double().mean().item()
    assert evaluation.top1_error == pytest.approx(wrong)


def test_it_learns(tmp_path):
    trainer = small_trainer(epochs=20, print_freq=100)
    before = trainer.evaluate().loss
    train(trainer, 50, tmp_path)
    assert before > 0.8 * math.log(3)
    assert trainer.evaluate().loss < 0.3 * math.log(3)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_stays_near_full_precision(tmp_path, amp):
    full, mixed = small_trainer(lr=0.0), small_trainer(lr=0.0, amp=amp)
    train(full, 2, tmp_path / "full")
    train(mixed, 2, tmp_path / "mixed")
    losses = [float(rows(tmp_path / name)[-1]["train_loss"]) for name in ("full", "mixed")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


def test_gradients_of_fp16_are_scaled_and_the_scale_is_saved(tmp_path):
    trainer = small_trainer(amp="fp16")
    before = trainer.model.fc8.weight.detach().clone()
    train(trainer, 6, tmp_path)
    assert trainer.model.fc8.weight.dtype == torch.float32
    assert not torch.equal(trainer.model.fc8.weight, before)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    state["scaler"]["scale"] = 256.0
    resumed = small_trainer(amp="fp16")
    resumed.load_state_dict(state)
    assert resumed.state_dict()["scaler"]["scale"] == 256.0


def test_divergence_stops_the_run_and_spares_the_checkpoint(tmp_path):
    train(small_trainer(), 5, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    wild = small_trainer(lr=1e20)
    wild.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    with pytest.raises(DivergedError, match=r"the loss is nan by step .* lower --lr"):
        wild.train(10, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_other_classes_are_refused():
    state = small_trainer().state_dict()
    with pytest.raises(UsageError, match=r"knows 3 classes \(class 0, .* colours has 4"):
        small_trainer(small_dataset(4)).load_state_dict(state)


@pytest.mark.slow
def test_compiled_run_agrees(tmp_path):
    plain = train(small_trainer(kernels="torch"), 3, tmp_path / "plain")
    compiled = train(small_trainer(kernels="compile"), 3, tmp_path / "compiled")
    for name, weight in plain.state_dict()["model"].items():
        torch.testing.assert_close(
            compiled.state_dict()["model"][name], weight, rtol=1e-4, atol=1e-5
        )


# The command line


@pytest.fixture
def folder(tmp_path):
    """A few easy images in three classes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("blue", "green", "red")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(4):
                image = random.integers(0, 100, (40, 40, 3), np.uint8)
                image[..., 2 - label] += 150
                Image.fromarray(image).save(tmp_path / "images" / split / name / f"{index}.png")
    return tmp_path / "images"


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_alexnet.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_main_job_end_to_end(tmp_path):
    output = tmp_path / "run"
    result = run_program("--steps", "3", "--print-freq", "2", "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(output)] == ["2", "3"]
    assert "done: loss" in result.stdout.splitlines()[-1]
    assert "top-1 error" in result.stdout.splitlines()[-1]
    assert checkpoint.load(output / "checkpoint.pt")["step"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is no interpreter")
def test_triton_kernels_give_the_losses_of_plain_pytorch(folder, tmp_path):
    losses = {}
    for kernels in ("triton", "torch"):
        result = run_program(
            *("--data", str(folder), "--preset", "mini", "--kernels", kernels, "-b", "4"),
            *("--steps", "3", "--print-freq", "1", "-j", "0", "--output", str(tmp_path / kernels)),
        )
        assert result.returncode == 0, result.stderr
        written = rows(tmp_path / kernels)
        losses[kernels] = [float(row["train_loss"]) for row in written]
        losses[kernels].append(float(written[-1]["val_loss"]))
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-3)


def test_help_needs_no_torch():
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from alexkern.training.cli import main\n"
            "try: main(['--help'])\n"
            "finally: assert 'torch' not in sys.modules",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "--kernels" in result.stdout


def test_resume_evaluate_and_options_of_the_checkpoint(folder, tmp_path, capsys):
    output = str(tmp_path / "run")
    begin = ["--data", str(folder), "--preset", "mini", "-b", "4", "-j", "0", "--epochs", "2"]
    assert main([*begin, "--seed", "5", "--steps", "2", "--output", output]) == 0
    assert main(["--resume", "--output", output]) == 0
    state = checkpoint.load(Path(output) / "checkpoint.pt")
    assert (state["step"], state["epoch"], state["options"]["seed"]) == (6, 2, 5)
    capsys.readouterr()
    metrics = (Path(output) / "metrics.csv").read_bytes()
    assert main(["--evaluate", "--resume", f"{output}/checkpoint.pt"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"top-1 error {float(rows(Path(output))[-1]['val_top1_error']):.2%}" in last
    assert (Path(output) / "metrics.csv").read_bytes() == metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "papr"], ["unknown preset 'papr'", "mini"]),
        (["--data", "no/such/folder"], ["no folder 'no/such/folder'", "digits"]),
        (["--kernels", "cuda"], ["--kernels", "triton"]),
        (["--epochs", "0"], ["--epochs", "'0' is not an integer of at least 1"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--evaluate"], ["--resume"]),
        (["--resume"], ["--output"]),
        (["--resume", "no.pt"], ["no checkpoint at no.pt"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse's own way out
        code = end.code
    complaint = capsys.readouterr().err
    assert code == 2
    assert complaint.startswith("train_alexnet.py: error: ")
    assert complaint.count("\n") == 1
    for word in words:
        assert word in complaint


def test_wrong_data_is_one_line_and_exit_code_2(folder):
    (folder / "train" / "grey").mkdir()
    (folder / "val" / "grey").mkdir()
    result = run_program("--data", str(folder))
    assert result.returncode == 2
    assert result.stderr.startswith("train_alexnet.py: error: class folder ")
    assert result.stderr.count("\n") == 1


def test_checkpoint_of_another_preset_or_class_count(folder, tmp_path, capsys):
    output = str(tmp_path / "run")
    begin = ["--preset", "mini", "-j", "0", "-b", "4", "--data", str(folder)]
    assert main([*begin, "--steps", "1", "--output", output]) == 0
    capsys.readouterr()
    for arguments, word in (
        (["--resume", "--output", output, "--preset", "paper"], "preset 'mini', not 'paper'"),
        (["--resume", "--output", output, "--data", "digits"], "3 classes"),
        (["--output", output], "holds a run"),
    ):
        assert main(arguments) == 2
        assert word in capsys.readouterr().err


def test_divergence_is_exit_code_1(folder, tmp_path, capsys):
    arguments = ["--data", str(folder), "--preset", "mini", "-j", "0", "-b", "4", "--lr", "1e20"]
    assert main([*arguments, "--steps", "6", "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("train_alexnet.py: error: the loss is")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# The promises of the main job, in full


@pytest.mark.slow
def test_digits_are_learnt_to_three_percent(tmp_path):
    result = run_program("--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert float(rows(tmp_path)[-1]["val_top1_error"]) <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_steps_of_the_interpreter_suffice_for_every_seed(tmp_path, seed):
    """On plain PyTorch, whose losses are those of the kernels."""
    steps = ["--steps", str(INTERPRETED_STEPS), "--kernels", "torch"]
    assert main([*steps, "--seed", str(seed), "--output", str(tmp_path)]) == 0
    written = rows(tmp_path)
    assert float(written[0]["train_top1_error"]) > 0.7
    assert float(written[-1]["val_top1_error"]) < 0.5
