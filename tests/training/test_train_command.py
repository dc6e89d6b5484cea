import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import PROGRAM, ROOT, assert_same, newest, rows, run_program, start_program
from torch.distributed import HashStore

from alexkern.predictions import Predictions
from alexkern.runtime import dispatch
from alexkern.training import cli, processes
from alexkern.training.cli import INTERPRETED_STEPS, main
from alexkern.training.loop import Trainer
from alexkern.training.options import read_config
from alexkern.training.processes import Process


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


@pytest.fixture
def small(folder):
    """Three steps an epoch."""
    return ["--data", str(folder), "--preset", "mini", "-b", "4", "-j", "0"]


def test_main_job_end_to_end(tmp_path):
    output = tmp_path / "run"
    result = run_program("--steps", "3", "--print-freq", "2", "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(output)] == ["2", "3"]
    best, time = result.stdout.splitlines()[-2:]
    assert best.startswith("best: loss")
    assert "top-1 error" in best
    assert time.startswith("time: ")
    assert "waiting for data" in time
    assert newest(output)["step"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is no interpreter")
def test_triton_kernels_give_the_losses_of_plain_pytorch(small, tmp_path):
    losses = {}
    for kernels in ("triton", "torch"):
        result = run_program(
            *(*small, "--kernels", kernels, "--colour-noise", "stdev"),
            *("--steps", "3", "--print-freq", "1", "--output", str(tmp_path / kernels)),
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


def test_resume_evaluate_and_options_of_the_checkpoint(small, tmp_path, capsys):
    output = tmp_path / "run"
    begin = [*small, "--epochs", "2", "--seed", "5", "--output", str(output)]
    assert main([*begin, "--steps", "2"]) == 0
    assert main(["--resume", "--output", str(output), "--lr", "0.02"]) == 0
    out = capsys.readouterr().out
    assert f"resumed {output}/checkpoint-00000002.pt at step 2" in out
    assert "changed: lr 0.01 -> 0.02\n" in out
    state = newest(output)
    assert (state["step"], state["options"]["seed"], state["options"]["lr"]) == (6, 5, 0.02)
    metrics = (output / "metrics.csv").read_bytes()
    error = f"top-1 error {float(rows(output)[-1]['val_top1_error']):.2%}"
    for resumed in (output, output / "checkpoint-00000006.pt"):
        assert main(["--evaluate", "--resume", str(resumed)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("central crop: loss")
        assert error in last
    assert (output / "metrics.csv").read_bytes() == metrics


def test_automatic_resumption_begins_where_there_is_nothing(small, tmp_path, capsys):
    """So that one command line serves the first start and every restart."""
    command = [*small, "--epochs", "1", "--output", str(tmp_path / "run"), "--resume", "auto"]
    assert main([*command, "--steps", "1"]) == 0
    assert "a new run" in capsys.readouterr().out
    assert main(command) == 0
    assert "at step 1" in capsys.readouterr().out


def test_automatic_resumption_of_a_run_that_was_killed_before_its_first_checkpoint(
    small, tmp_path, capsys
):
    """Which is written after best.pt."""
    output = tmp_path / "run"
    command = [*small, "--epochs", "1", "--output", str(output), "--resume", "auto"]
    assert main(command) == 0
    whole = newest(output)
    for path in output.glob("checkpoint-*.pt"):
        path.unlink()
    assert main(command) == 0
    assert_same(newest(output), whole)


def test_a_signal_stops_the_evaluation_at_the_end(small, tmp_path, capsys, monkeypatch):
    def train(*_) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(Trainer, "train", train)
    assert main([*small, "--ten-crop", "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "stopped by SIGTERM after step 0" in out
    assert "ten crops" not in out


def facts_of(*arguments: str) -> dict[str, str]:
    """What processes with this command line must agree on."""
    facts: dict[str, str] = {}
    process = Process(0, 1, torch.device("cpu"))
    cli._prepared(cli._parser().parse_args(arguments), process, facts)
    return facts


@pytest.mark.parametrize(
    "more",
    [
        *(["--columns", "2"], ["--parallel", "hybrid"], ["--steps", "3"], ["--ten-crop"]),
        *(["--predictions", "a.npz"], ["--lr", "0.5"], ["--data", "synthetic"], ["--amp", "bf16"]),
    ],
    ids=" ".join,
)
def test_processes_must_agree_on_what_they_do(more):
    assert facts_of(*more) != facts_of()


def test_processes_must_agree_on_files_and_machines(small, tmp_path, monkeypatch):
    paths = [tmp_path / f"run{step}" / "checkpoint-00000001.pt" for step in (1, 2)]
    for step, path in enumerate(paths, 1):
        run = ["--output", str(path.parent), "--steps", str(step)]
        assert main([*small, "--epochs", "1", *run]) == 0
    (paths[1].parent / "checkpoint-00000002.pt").rename(paths[1])
    first, second = (facts_of("--resume", str(path)) for path in paths)
    assert {name for name in first if first[name] != second[name]} == {"the checkpoint"}
    monkeypatch.setattr(dispatch, "gpu_name", lambda _: "another")
    monkeypatch.setattr(dispatch, "table_digest", lambda _: "another")
    third = facts_of("--resume", str(paths[0]))
    different = {name for name in first if first[name] != third[name]}
    assert different == {"the GPU", "the table of kernels"}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--parallel", "hybrid"], "--parallel hybrid has the fully connected layers in columns"),
        (["--max-restarts", "2"], "--max-restarts 2 is for processes that --columns starts"),
    ],
)
def test_what_needs_columns_is_refused_without(capsys, option, words):
    assert main(option) == 2
    assert f"error: {words}: add --columns N" in capsys.readouterr().err


@pytest.fixture
def restarted(monkeypatch):
    """As torchrun starts a process again and again: something is kept in between."""
    process = Process(0, 1, torch.device("cpu"), HashStore())
    monkeypatch.setattr(processes, "joined", lambda _: nullcontext(process))


def test_a_restart_does_not_take_up_another_run(restarted, small, tmp_path, capsys):
    """Which the first attempt was refused to write over."""
    command = [*small, "--epochs", "1", "--output", str(tmp_path)]
    (tmp_path / "checkpoint-00000001.pt").write_bytes(b"of another run")
    for _ in range(2):
        assert main(command) == 2
        assert f"{tmp_path} holds a run" in capsys.readouterr().err


def test_a_restart_goes_on_from_the_newest_checkpoint(restarted, small, tmp_path, capsys):
    """That of the run, and until there is one that which the run has begun with."""
    first, output = tmp_path / "first", tmp_path / "run"
    assert main([*small, "--steps", "1", "--output", str(first), "--resume", "auto"]) == 0
    begin = ["--resume", str(first / "checkpoint-00000001.pt"), "--output", str(output)]
    output.mkdir()
    for step in (2, 3):
        assert main([*begin, "--steps", str(step)]) == 0
        assert f"at step {step - 1}\n" in capsys.readouterr().out


def test_a_run_goes_back_only_in_another_folder(small, tmp_path, capsys):
    """Where its checkpoints are the newest, and the later ones of the first run stay."""
    output, other = tmp_path / "run", tmp_path / "other"
    assert main([*small, "--epochs", "3", "--output", str(output)]) == 0
    back = ["--resume", str(output / "checkpoint-00000006.pt"), "--steps", "7"]
    before = {path: path.read_bytes() for path in output.iterdir()}
    for given in ([], ["--output", str(output)]):
        assert main([*back, *given]) == 2
        assert "checkpoint-00000009.pt is newer than" in capsys.readouterr().err
    assert main([*back, "--output", str(other)]) == 0
    assert newest(other)["step"] == 7
    assert main([*back, "--output", str(other)]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_the_newest_file_of_a_run_is_continued_in_its_folder(small, tmp_path):
    output = tmp_path / "run"
    assert main([*small, "--epochs", "2", "--output", str(output)]) == 0
    last = str(output / "checkpoint-00000006.pt")
    assert main(["--resume", last, "--epochs", "3"]) == 0
    assert newest(output)["step"] == 9


def test_a_damaged_checkpoint_is_passed_over(small, tmp_path, capsys):
    output = tmp_path / "run"
    begin = [*small, "--epochs", "3", "--output", str(output)]
    assert main([*begin, "--steps", "6"]) == 0
    path = output / "checkpoint-00000006.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    capsys.readouterr()
    assert main(["--resume", "auto", "--output", str(output), "--steps", "5"]) == 0
    said = capsys.readouterr()
    assert f"warning: {path} is not a readable checkpoint" in said.err
    assert "checkpoint-00000003.pt at step 3" in said.out
    assert newest(output)["step"] == 5
    assert not path.exists()


def test_a_file_of_options_and_flags_above_it(small, tmp_path):
    config, output = tmp_path / "mine.toml", tmp_path / "run"
    config.write_text('schedule = "step:1"\nlr = 0.5\nseed = 7\ntarget = "all of it"\n')
    begin = [*small, "--config", str(config), "--lr", "0.25", "--output", str(output)]
    assert main([*begin, "--steps", "1"]) == 0
    resolved = read_config(output / "config.toml")
    chosen = {name: resolved[name] for name in ("schedule", "lr", "seed", "target", "batch_size")}
    assert chosen == {
        **{"schedule": "step:1", "lr": 0.25, "seed": 7, "target": "all of it"},
        "batch_size": 4,
    }
    again = tmp_path / "again"
    saved = str(output / "config.toml")
    assert main(["--config", saved, "--steps", "1", "--output", str(again)]) == 0
    assert (again / "config.toml").read_text() == (output / "config.toml").read_text()
    assert newest(again)["options"] == newest(output)["options"]


def test_weights_that_a_file_of_options_names_are_evaluated(small, tmp_path, capsys):
    output, config = tmp_path / "run", tmp_path / "mine.toml"
    assert main([*small, "--steps", "3", "--output", str(output)]) == 0
    config.write_text(f'weights = "{output / "best.pt"}"\n')
    capsys.readouterr()
    assert main(["-e", *small, "--config", str(config)]) == 0
    error = f"top-1 error {float(rows(output)[-1]['val_top1_error']):.2%}"
    assert error in capsys.readouterr().out.splitlines()[-1]


def test_a_deterministic_run_asks_torch_for_it(small, tmp_path):
    try:
        assert main([*small, "--deterministic", "--steps", "1", "--output", str(tmp_path)]) == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_predictions_of_ten_crops(small, tmp_path, capsys):
    output, path = tmp_path / "run", tmp_path / "predictions.npz"
    assert main([*small, "--steps", "3", "--output", str(output)]) == 0
    capsys.readouterr()
    evaluate = ["-e", "--resume", str(output), "--ten-crop", "--predictions", str(path)]
    assert main(evaluate) == 0
    lines = capsys.readouterr().out.splitlines()
    found = Predictions.load(path)
    assert (found.views, found.class_names) == (10, ("blue", "green", "red"))
    assert lines[-1] == f"wrote {path}"
    assert f"ten crops: loss {found.loss():.4f}, top-1 error {found.error(1):.2%}" in lines[-2]


def test_evaluation_by_several_processes(small, tmp_path, capfd):
    output = tmp_path / "run"
    assert main([*small, "--steps", "3", "--output", str(output)]) == 0
    error = f"top-1 error {float(rows(output)[-1]['val_top1_error']):.2%}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [str(ROOT / "train_alexnet.py"), "-e", "--resume", str(output)]
    found = subprocess.run(
        [*launcher, "--nproc-per-node=2", *program], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("central crop")]
    assert error in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "papr"], ["unknown preset 'papr'", "mini"]),
        (["--data", "no/such/folder"], ["no folder 'no/such/folder'", "digits"]),
        (["--kernels", "cuda"], ["--kernels", "triton"]),
        (["--epochs", "0"], ["--epochs", "'0' is not an integer of at least 1"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--schedule", "never"], ["'never'", "plateau[:PATIENCE]"]),
        (["--crop-offsets", "9"], ["crop_offsets must be 1 to 5", "got 9"]),
        (["--config", "no.toml"], ["--config no.toml", "No such file"]),
        (["--evaluate"], ["--resume"]),
        (["--resume"], ["--output"]),
        (["--resume", "no.pt"], ["no checkpoint at no.pt"]),
        (["--resume", "tests"], ["no checkpoint in tests"]),
        (["--output", "/proc/run", "--steps", "1"], ["cannot write to --output /proc/run"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
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


def test_resumption_of_what_cannot_go_on(small, tmp_path, capsys):
    output = str(tmp_path / "run")
    assert main([*small, "--steps", "1", "--output", output]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    for arguments, word in (
        (["--resume", "--output", output, "--preset", "paper"], "preset 'mini', not 'paper'"),
        (["--resume", "--output", output, "--weights", "x.pt"], "weights '', not 'x.pt'"),
        (["--resume", "--output", output, "--data", "digits"], "3 classes"),
        (["--resume", "--output", output, "-b", "3"], "has 3 steps, and now 4"),
        (["--output", output], "holds a run"),
    ):
        assert main(arguments) == 2
        assert word in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert main(["-e", "--resume", output, "-b", "3"]) == 0


def test_a_finished_run_says_so(small, tmp_path, capsys):
    command = [*small, "--epochs", "1", "--output", str(tmp_path), "--resume"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("time: ")
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was left to do after step 3"


@pytest.mark.slow
def test_replicas_under_torchrun(small, tmp_path):
    """A folder of images, workers, TensorBoard, ten crops, predictions: all once, as by one."""
    more = ["--ten-crop", "--epochs", "1", "-j", "1", "--tensorboard"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    found = {}
    for name, program in {"one": PROGRAM, "two": (*torchrun, *PROGRAM[1:])}.items():
        output = ["--output", str(tmp_path / name), "--predictions", str(tmp_path / f"{name}.npz")]
        process = start_program(*small, *more, *output, program=program)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.count("ten crops: ") == out.count("held out after step 3") == 1
        found[name] = Predictions.load(tmp_path / f"{name}.npz")
    assert "2 processes: 2 x a network of one process" in out
    np.testing.assert_allclose(found["two"].probabilities, found["one"].probabilities, rtol=1e-3)
    losses = [float(rows(tmp_path / name)[-1]["val_loss"]) for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_columns_that_processes_do_not_divide_into(small, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([*small, "--columns", "2"]) == 2
    line = "--columns 2: 1 processes do not divide into 2 columns each"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("world", ["2", "many"])
def test_a_world_without_a_launcher_is_one_line(small, monkeypatch, capsys, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert main(small) == 2
    err = capsys.readouterr().err
    assert f"WORLD_SIZE is {world}" in err
    assert "torchrun" in err
    assert err.count("\n") == 1


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
