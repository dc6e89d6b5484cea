"""What the README shows runs as written, and its numbers are the code's."""

import re
from typing import Any

import pytest
from pages import ROOT, blocks

from alexkern.models import alexnet

PAGE = ROOT / "README.md"
README = PAGE.read_text(encoding="utf-8")


def test_opens_with_the_two_commands() -> None:
    first, second = blocks(PAGE, "bash")[0].splitlines()
    assert first.startswith("pip install")
    assert first.endswith("python train_alexnet.py --kernels triton")
    assert second.startswith("pip install")
    assert second.endswith("pytest -n auto")


def test_python_examples_run() -> None:
    operations, modules = blocks(PAGE, "python")
    names: dict[str, Any] = {}
    exec(operations, names)
    assert names["maps"].shape == (8, 96, 27, 27)
    assert names["weight"].grad is not None
    exec(modules, names)
    assert names["model"](names["image"]).shape == (8, 10)


@pytest.mark.parametrize(
    ("preset", "count"), re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", README, re.MULTILINE)
)
def test_parameter_counts(preset: str, count: str) -> None:
    import torch

    with torch.device("meta"):
        parameters = sum(p.numel() for p in alexnet(preset).parameters())
    assert parameters == int(count.replace(",", ""))
