"""The examples run as they are printed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    if path.stem == "accelerate_torchvision":
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError) as error:  # the latter next to another torch
            pytest.skip(f"no torchvision that fits this torch: {error}")
    command = [sys.executable, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout
    if path.stem == "accelerate_torchvision":
        assert "replaced: 30" in run.stdout
