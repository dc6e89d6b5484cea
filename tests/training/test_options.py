import math
import os
from dataclasses import fields

import pytest

from alexkern.training.errors import UsageError
from alexkern.training.options import Options, read_config, resolve


def test_options_come_from_command_line_then_checkpoint_then_preset():
    saved = {"data": "digits", "preset": "mini", "lr": 0.5, "seed": 4}
    options = resolve({"lr": 0.25}, saved)
    assert (options.lr, options.seed, options.batch_size) == (0.25, 4, 32)
    assert resolve({}, {}).preset == "mini"
    assert resolve({}, {}).workers == 0
    assert resolve({"data": "synthetic"}, {}).preset == "paper"
    assert resolve({"data": "synthetic"}, {}).workers > 0


@pytest.mark.parametrize(("processes", "workers"), [(None, 64), ("1", 64), ("8", 8), ("96", 1)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, processes, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert resolve({"data": "synthetic"}, {}).workers == workers


def test_defaults_of_the_paper_are_its_recipe():
    paper = resolve({"data": "/images"}, {})
    assert (paper.preset, paper.epochs, paper.batch_size, paper.lr) == ("paper", 90, 128, 0.01)
    assert (paper.momentum, paper.weight_decay) == (0.9, 0.0005)
    assert (paper.bias_lr_factor, paper.bias_weight_decay) == (1.0, 0.0005)
    assert (paper.dropout_mode, paper.colour_noise) == ("paper", "stdev")


def test_biases_decay_as_weights_do_unless_told_otherwise():
    assert resolve({"weight_decay": 0.01}, {}).bias_weight_decay == 0.01
    assert resolve({"weight_decay": 0.01, "bias_weight_decay": 0.0}, {}).bias_weight_decay == 0


def test_a_file_says_what_the_options_say(tmp_path):
    given = {"data": 'a "folder"\\ with ümlaut', "preset": "paper", "conv1_epochs": 72, "lr": 1e-5}
    options = resolve(given, {})
    path = tmp_path / "config.toml"
    path.write_text(options.to_toml(), encoding="utf-8")
    assert resolve(read_config(path), {}) == options


def test_whole_numbers_do_for_fractions(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("lr = 1\nsave_minutes = 5\n")
    assert read_config(path) == {"lr": 1.0, "save_minutes": 5.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = ", "no TOML"),
        ("\xff", "no TOML"),
        ("learning_rate = 1", "no option is called learning_rate"),
        ("lr = '0.1'", "lr must be float, got '0.1'"),
        ("epochs = 1.5", "epochs must be int, got 1.5"),
        ("epochs = true", "epochs must be int, got True"),
        ("conv1_epochs = 'x'", "conv1_epochs must be int, got 'x'"),
        ("deterministic = 1", "deterministic must be bool, got 1"),
        (None, "cannot read --config"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, words):
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=words) as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kernels": "cuda"}, "kernels must be one of auto, triton"),
        ({"colour_noise": "much"}, "colour_noise must be one of none, stdev"),
        ({"schedule": "never"}, "no learning rate schedule 'never'"),
        ({"bias_schedule": "never"}, "no learning rate schedule 'never'"),
        ({"bias_schedule": "plateau:3"}, "plateau is for schedule"),
        ({"batch_size": 0}, "batch_size must be a finite number of at least 1, got 0"),
        ({"crop_offsets": 6}, "crop_offsets must be 1 to 5"),
        ({"crop_offsets": 0}, "crop_offsets must be a finite number of at least 1"),
        ({"crop_chunk": 0}, "crop_chunk must be a finite number of at least 1"),
        ({"lr": -0.1}, "lr must be a finite number of at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be a finite number of at least 0, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number of at least 0"),
        ({"seed": -1}, "seed must be a finite number of at least 0"),
        ({"workers": -1}, "workers must be a finite number of at least 0"),
        ({"conv1_epochs": -1}, "conv1_epochs must be a finite number of at least 0"),
        ({"preset": "papr"}, "unknown preset 'papr'"),
    ],
)
def test_values_that_cannot_be(given, words):
    with pytest.raises(UsageError, match=words):
        resolve(given, {})


def test_an_environment_variable_chooses_the_kernels(monkeypatch):
    monkeypatch.setenv("ALEXKERN_KERNELS", "torch")
    assert resolve({}, {}).kernels == "torch"
    monkeypatch.setenv("ALEXKERN_KERNELS", "trtn")
    with pytest.raises(UsageError, match="trtn"):
        resolve({}, {})


def test_every_option_is_a_flag():
    """Those of a target are words, which only files have."""
    from alexkern.training.cli import _parser

    flags = {action.dest for action in _parser()._actions}
    assert {field.name for field in fields(Options)} - flags == {"target"}
