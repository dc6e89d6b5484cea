"""Set up the benchmarks, and say plainly what a machine without a GPU leaves unmeasured."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

NO_GPU = "no GPU: a time in Triton's interpreter says nothing about the kernel"


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU, with cuDNN's own search for its fastest algorithm on."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count what was skipped for want of a GPU."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_GPU in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} benchmarks need a GPU and were skipped: the ops against cuDNN (NCHW "
            "and channels_last) and torch.compile. Measured above: host overhead of a call and "
            "the data pipeline."
        )
