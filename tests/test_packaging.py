"""A built wheel holds the device code as alexkern.kernels and no top-level package beside it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEMS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


@pytest.mark.slow
def test_wheel_runs_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("alexkern-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert top == {"alexkern"}
    assert {f"alexkern/kernels/{stem}" for stem in STEMS} <= set(names)
    assert "alexkern/py.typed" in names

    script = (
        "import torch, alexkern, alexkern.ops as ops\n"
        "with alexkern.use_backend('triton'):\n"
        "    print(alexkern.__file__, ops.max_pool2d(torch.arange(16.).view(1, 1, 4, 4), 2))\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "TRITON_INTERPRET": "1", "PATH": ""},
        check=True,
    )
    assert str(tmp_path / "site") in run.stdout
    assert "15." in run.stdout


def test_no_top_level_kernels_package() -> None:
    """Hugging Face owns that import name; a folder without __init__ never shadows it."""
    assert STEMS
    assert not (ROOT / "kernels" / "__init__.py").exists()
