"""`python -m bench`: one line for what cannot be done, and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], "usage: python -m bench {report,compare,static}"),
        (["dance"], "usage: python -m bench {report,compare,static}"),
        (["report", "/nowhere/record.json"], "error: /nowhere/record.json: "),
        (["compare", "README.md", "README.md"], "error: README.md: "),
    ],
)
def test_what_cannot_be_done(arguments: list[str], printed: str) -> None:
    command = [sys.executable, "-m", "bench", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert (run.stderr + run.stdout).startswith(printed)
    assert (run.stderr + run.stdout).count("\n") == 1
