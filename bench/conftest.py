"""Set up the benchmarks, and say plainly what a machine without a GPU leaves unmeasured."""

import os
from collections.abc import Callable, Iterator
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


_RATES: dict[str, float] = {}


@pytest.fixture
def images_per_second(benchmark: Any, request: Any) -> Iterator[Callable[[int], None]]:
    """To be called after the benchmark with the images per round; the rate is reported."""
    images = 0

    def of(count: int) -> None:
        nonlocal images
        images = count

    yield of
    if benchmark.stats:  # none under --benchmark-disable
        rate = images / benchmark.stats["median"]
        _RATES[request.node.name] = benchmark.extra_info["images_per_second"] = rate


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the data pipeline's rates, and count what was skipped for want of a GPU."""
    for name, rate in _RATES.items():
        terminalreporter.write_line(f"{name}: {rate:,.0f} images/s on one core")
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_GPU in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} benchmarks need a GPU and were skipped: the ops against cuDNN (NCHW "
            "and channels_last) and torch.compile. Measured above: host overhead of a call and "
            "the data pipeline."
        )
