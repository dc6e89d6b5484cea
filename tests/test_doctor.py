"""What `alexkern info` and `doctor` say, and that a fault is seen."""

import json

import pytest
import torch

from alexkern import cli, doctor, ops
from alexkern.runtime import dispatch


@pytest.fixture(autouse=True)
def no_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEXKERN_TABLES", str(tmp_path))
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path)


def test_every_op_is_right(backend, device):
    found = doctor.checks(device)
    assert {check.op for check in found} == {*ops.__all__, "KrizhevskySGD"}
    wanted = "triton kernels" if backend == "triton" else "plain PyTorch"
    for check in found:
        assert not check.problem
        assert check.error < 1e-6
        assert check.runs == wanted


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_fault_is_seen(monkeypatch, capsys, fault):
    right = ops.local_response_norm

    def wrong(input, size):
        if input.dtype == torch.float64:
            return right(input, size)
        if fault == "raises":
            raise RuntimeError("no such device")
        return right(input, size) + 1e-3

    monkeypatch.setattr(ops, "local_response_norm", wrong)
    assert cli.main(["doctor"]) == 1
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("local_response"))
    assert ("no such device" if fault == "raises" else "wrong result") in line


def test_in_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["checks"]) == len(doctor.checks(torch.device("cpu")))
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        name: value for name, value in found.items() if name != "checks"
    }


def test_what_runs_and_why(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for backend, why in (
        ("auto", "plain PyTorch, as torch finds no GPU"),
        ("torch", "plain PyTorch was asked for"),
        ("triton", "this project's kernels were asked for; they run in Triton's interpreter"),
    ):
        monkeypatch.setenv("ALEXKERN_KERNELS", backend)
        assert cli.main(["info"]) == 0
        text = capsys.readouterr().out
        assert f"torch {torch.__version__}" in text
        assert f"backend {backend}: {why}" in text
        assert "tables: none" in text
    (tmp_path / "gpu.json").touch()
    cli.main(["info"])
    assert "gpu.json" in capsys.readouterr().out


def test_an_unknown_backend_is_named(capsys, monkeypatch):
    monkeypatch.setenv("ALEXKERN_KERNELS", "fast")
    assert cli.main(["info"]) == 2
    assert "'fast'" in capsys.readouterr().err
