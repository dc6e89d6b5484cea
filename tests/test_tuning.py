"""Measuring on a CPU: who may win, what is kept, and what the command says."""

import dataclasses

import pytest
import torch

import alexkern.ops.conv_passes as conv_passes
from alexkern import cli, tuning
from alexkern.runtime import config, dispatch
from alexkern.runtime.config import MatmulConfig
from alexkern.runtime.dispatch import Candidate, Convolution, Table

CPU = torch.device("cpu")
PROBLEM = Convolution(
    "forward", "tf32", True, (2, 6, 7, 6), (4, 3, 3, 3), (2, 1), (1, 2, 0, 1), (1, 1), 2
)
TILES = [
    MatmulConfig(16, 16, 16, 4, 2),
    MatmulConfig(32, 16, 16, 4, 2),
    MatmulConfig(16, 16, 16, 4, 2, boxes=True),
]


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "candidates", lambda kind, element_size: TILES)
    monkeypatch.setenv("ALEXKERN_TABLES", str(tmp_path))
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path / "shipped")


def measured(problem=PROBLEM):
    kept = {}
    tuning.tune([problem], CPU, kept.__setitem__, rounds=2)
    return {candidate.choice: candidate for candidate in kept[problem]}


@pytest.mark.parametrize("direction", dispatch.DIRECTIONS)
@pytest.mark.parametrize("dtype", ["tf32", "float16"])
def test_every_way_is_checked_and_timed(direction, dtype):
    found = measured(dataclasses.replace(PROBLEM, direction=direction, dtype=dtype))
    boxes = found.pop("triton 16-16-16-4-2-boxes")  # 3 channels per group: no rows of 16 bytes
    assert boxes.microseconds is None
    assert "boxes" in boxes.failure
    assert list(found) == [
        *(f"vendor {variant}" for variant in ("nchw", "channels_last")),
        *(f"vendor {variant}_split" for variant in ("nchw", "channels_last")),
        "triton",
        "triton 16-16-16-4-2",
        "triton 32-16-16-4-2",
    ]
    for candidate in found.values():
        assert not candidate.failure
        assert candidate.microseconds > 0
        assert candidate.error_ratio <= 1


@pytest.mark.parametrize("error", [1.0, 1e-6])
def test_a_wrong_candidate_cannot_win(monkeypatch, error):
    launch = conv_passes._launch_conv2d

    def wrong(source, weight, bias, result, *arguments):
        launch(source, weight, bias, result, *arguments)
        if arguments[-1] == TILES[1]:
            result[0, 0, 0, 0] += error  # of one element of many, and be it a small one

    monkeypatch.setattr(conv_passes, "_launch_conv2d", wrong)
    found = measured()
    assert found["triton 32-16-16-4-2"].failure == "wrong result"
    assert found["triton 32-16-16-4-2"].microseconds is None
    assert (found["triton 32-16-16-4-2"].error_ratio > 1) == (error == 1.0)
    table = Table("cpu", {}, {PROBLEM: list(found.values())})
    assert table.best(PROBLEM, "triton").choice != "triton 32-16-16-4-2"


def test_a_lost_gpu_leaves_what_was_found_and_who_did_it(monkeypatch):
    def lose(device, found):
        raise tuning.DeviceLostError("lost", found)

    monkeypatch.setattr(tuning, "_check_device", lose)
    boxes = dataclasses.replace(PROBLEM, direction="weight_grad")
    kept = {}
    with pytest.raises(tuning.DeviceLostError):
        tuning.tune([boxes, PROBLEM], CPU, kept.__setitem__, rounds=2)
    assert list(kept) == [boxes]
    assert "boxes" in kept[boxes][-1].failure


def test_the_users_settings_are_left_as_they_were(monkeypatch):
    switch = torch.backends.cudnn
    monkeypatch.setattr(switch, "enabled", False)
    before = switch.conv.fp32_precision, switch.benchmark
    measured()
    assert (switch.conv.fp32_precision, switch.benchmark, switch.enabled) == (*before, False)


def test_the_networks_problems():
    problems = tuning.network_problems("paper", 128, torch.bfloat16, True)
    # five layers, three passes, no gradient of the images; and the first layer on packed ones
    assert len(problems) == 14 + 2
    assert [problem.direction for problem in problems[:5]] == ["forward"] * 5
    for first, input, weight in (
        (problems[0], (128, 3, 224, 224), (96, 3, 11, 11)),
        (problems[-1], (128, 48, 57, 57), (96, 48, 3, 3)),
    ):
        assert (first.input, first.weight) == (input, weight)
    assert all(problem.channels_last and problem.dtype == "bfloat16" for problem in problems)


class TestCommand:
    def test_without_a_gpu_it_says_so(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main(["tune"]) == 2
        assert "needs a GPU" in capsys.readouterr().err

    def test_nothing_measured_is_said(self, capsys):
        assert cli.main(["tune", "--show"]) == 0
        assert "nothing has been measured" in capsys.readouterr().out

    def test_show(self, capsys, tmp_path):
        candidates = [
            Candidate("vendor channels_last", 30.0, 0.5),
            Candidate("triton", 20.0, 0.5),
            Candidate("triton 32-16-16-4-2", 10.0, 90.0, "wrong result"),
        ]
        table = Table("GPU", {"torch": "1"}, {PROBLEM: candidates})
        dispatch.save(table, tmp_path / "gpu.json")
        assert cli.main(["tune", "--show"]) == 0
        header, unused, line = capsys.readouterr().out.splitlines()
        assert header.endswith("gpu.json: GPU, torch 1")
        assert "other versions" in unused
        assert line.startswith("forward [2, 6, 7, 6] -> 4, 3x3, stride 2, groups 2, tf32")
        assert (
            "triton wins; triton 20.0 us; vendor channels_last 30.0 us; triton is 1.50x as fast"
            in line
        )

    def test_a_broken_table_is_named(self, capsys, tmp_path):
        (tmp_path / "gpu.json").write_text("{")
        assert cli.main(["tune", "--show"]) == 2
        assert "gpu.json" in capsys.readouterr().err

    def test_unknown_names(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["tune", "--dtype", "int8"])
        assert "int8" in capsys.readouterr().err
