"""What the README shows runs as written, and its numbers are the code's."""

import re
from pathlib import Path
from typing import Any

import pytest

from alexkern.models import alexnet

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_opens_with_the_two_commands() -> None:
    first, second = blocks("bash")[0].splitlines()
    assert first.startswith("pip install")
    assert first.endswith("python train_alexnet.py --kernels triton")
    assert second.startswith("pip install")
    assert second.endswith("pytest")


def test_python_examples_run() -> None:
    operations, modules = blocks("python")
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
