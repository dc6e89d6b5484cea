"""The pages of docs/: examples run, links lead somewhere, signatures are the code's."""

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, blocks, run_python
from torch.utils.flop_counter import FlopCounterMode

from alexkern import ops, optim
from alexkern.models import PRESETS, AlexNet, Preset
from alexkern.training.cli import _parser

PAGES = sorted((ROOT / "docs").rglob("*.md"))
OP_PAGES = sorted((ROOT / "docs" / "ops").glob("*.md"))
WITH_COMMANDS = (ROOT / "README.md", ROOT / "configs" / "README.md")
NAMED = ("use", "numerics", "plot-and-average", "which-alexnet")
WITH_EXAMPLES = [*OP_PAGES, *(ROOT / "docs" / f"{name}.md" for name in NAMED)]
EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in WITH_EXAMPLES
    for number, block in enumerate(blocks(page, "python"), 1)
]
FOLDERS = ("alexkern", "bench", "docs", "examples", "kernels", "tests")
FILES = [
    path.relative_to(ROOT).as_posix()
    for found in (ROOT.glob("*.*"), *((ROOT / folder).rglob("*.*") for folder in FOLDERS))
    for path in found
]
PUBLIC = {
    **{name: getattr(ops, name) for name in ops.__all__},
    "KrizhevskySGD": optim.KrizhevskySGD,
    "weights_and_biases": optim.weights_and_biases,
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example: str, tmp_path: Path) -> None:
    """Each by itself, as a reader would copy it, without a GPU and without a choice of backend."""
    run = run_python(
        example, CUDA_VISIBLE_DEVICES="", ALEXKERN_KERNELS="auto", ALEXKERN_TABLES=str(tmp_path)
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_names_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`([\w./-]+\.(?:py|md|json|sh|toml))`", text):
        assert any(f"/{file}".endswith(f"/{name}") for file in FILES), name
    for name in re.findall(r"`alexkern((?:\.\w+)+)`", text):
        operand: Any = __import__("alexkern")
        for part in name[1:].split("."):
            operand = getattr(operand, part)


def commands(page: Path) -> list[str]:
    """Arguments of train_alexnet.py, in the blocks that a reader copies."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return re.findall(r"python train_alexnet\.py(.*)", text)


@pytest.mark.parametrize("page", [*WITH_COMMANDS, *PAGES], ids=name_of)
def test_commands_are_understood(page: Path) -> None:
    for command in commands(page):
        arguments = shlex.split(command.replace("$seed", "0"), comments=True)
        parsed = _parser().parse_args(arguments)
        assert parsed.config is None or (ROOT / parsed.config).is_file(), command


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_are_the_codes(name: str) -> None:
    """Every public op opens a page's block of signatures, just as it is defined."""
    shown = [
        block
        for page in OP_PAGES
        for text in blocks(page, "text")
        for block in re.split(r"\n(?=\w)", text)
        if block.startswith(f"{name}(")
    ]
    assert len(shown) == 1
    definition = f"def {shown[0].strip()}: ..."
    ast.parse(definition)
    namespace: dict[str, Any] = {"torch": torch}
    exec(definition, namespace)
    assert parameters(namespace[name]) == parameters(PUBLIC[name])


def test_every_stem_has_a_page() -> None:
    stems = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"channels"}
    assert stems <= {page.stem for page in OP_PAGES}


def listed(numbers: Iterable[object]) -> str:
    return ", ".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in numbers)


def sizes(preset: Preset) -> list[str]:
    with torch.device("meta"):
        model, images = AlexNet(preset), torch.empty(1, 3, *[preset.crop_size] * 2)
        with FlopCounterMode(display=False) as counter:
            model(images)
    present = [bool(width) for width in preset.widths]
    return [
        listed(width or "-" for width in preset.widths),
        listed(n if there else "-" for n, there in zip(preset.groups, present, strict=True)),
        listed(preset.fc_widths),
        listed(preset.fc_groups),
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{counter.get_total_flops() / 2e6:.1f}",
    ]


def steps_and_constants(preset: Preset) -> list[str]:
    norm, lrn = preset.response_norm, "-"
    if norm is not None:
        factor = norm.alpha / norm.size if norm.alpha_mode == "mean" else norm.alpha
        lrn = listed((norm.k, factor, norm.groups))
    return [
        str(preset.crop_size),
        listed(preset.conv1_padding),
        *(listed(s for s in steps if norm or s != "norm") for steps in preset.steps[:2]),
        lrn,
        str(preset.pool_kernel),
        f"{preset.dropout} {preset.dropout_mode}" + ", before" * preset.dropout_before,
    ]


def start(preset: Preset) -> list[str]:
    present = [*map(bool, preset.widths), True, True, True]
    stds, biases = (
        "PyTorch's"
        if preset.weight_std is None
        else listed(n if there else "-" for n, there in zip(numbers, present, strict=True))
        for numbers in (preset.weight_std or (), preset.bias)
    )
    assert preset.learning_rate == 0.01
    assert preset.epochs == (30 if preset.name == "mini" else 90)
    return [stds, biases, str(preset.batch_size), f"{preset.input_std:g}"]


@pytest.mark.parametrize(
    ("column", "cells"),
    [("channels", sizes), ("crop", steps_and_constants), ("deviation of the weights", start)],
)
def test_tables_of_presets(column: str, cells: Callable[[Preset], list[str]]) -> None:
    """Every preset stands in one row of each table, with the code's numbers."""
    page = (ROOT / "docs" / "which-alexnet.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| preset \| {column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
    shown = {}
    for row in table.splitlines():
        names, *numbers = row.strip("| ").split(" | ")
        shown |= dict.fromkeys(re.findall(r"`(\w+)`", names), numbers)
    assert shown == {name: cells(preset) for name, preset in PRESETS.items()}
