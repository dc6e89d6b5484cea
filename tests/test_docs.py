"""The pages of docs/: examples run, links lead somewhere, signatures are the code's."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, blocks, run_python

from alexkern import ops, optim

PAGES = sorted((ROOT / "docs").rglob("*.md"))
OP_PAGES = sorted((ROOT / "docs" / "ops").glob("*.md"))
OTHER_PAGES = [ROOT / "docs" / f"{name}.md" for name in ("use", "numerics", "plot-and-average")]
WITH_EXAMPLES = [*OP_PAGES, *OTHER_PAGES]
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
