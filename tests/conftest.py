"""Device, backend and allocation fixtures. Without a GPU, kernels run in Triton's interpreter."""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

# Small tensors, on as many workers as there are cores: more threads would only wait for each
# other. Read when torch is imported, by the processes that tests start as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is first imported

import alexkern
from alexkern.ops import conv_passes
from alexkern.runtime import dispatch
from alexkern.runtime.launch import Launch, empty, launch, poisoned_allocations

STEMS = ("augment", "conv", "conv_passes", "dropout", "linear", "lrn", "lrn_pool", "pool")

hypothesis.settings.register_profile(
    "alexkern", max_examples=25, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("alexkern")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def randn(device: torch.device) -> Callable[..., Tensor]:
    """Normal random tensors on the device, the same for the same arguments."""

    def make(
        *shape: int,
        dtype: torch.dtype = torch.float32,
        layout: str = "nchw",
        seed: int = 0,
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        if layout == "channels_last":
            return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        return tensor

    return make


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with alexkern.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton() -> Iterator[None]:
    with alexkern.use_backend("triton"):
        yield


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as `auto` computes them on a GPU where nothing was measured."""

    def choose(problem: dispatch.Convolution, **_: Any) -> dispatch.Choice:
        return dispatch.choose(problem, torch.device("cpu"), "auto")

    monkeypatch.setattr(conv_passes, "chooser", lambda tensor, backend: choose)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Elements that no kernel writes come out as NaN."""
    with poisoned_allocations():
        yield


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """float32 convolutions without TF32, unless a test asks for it."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches that the ops make during the test, on whatever thread."""
    made: list[Launch] = []
    options = ("num_warps", "num_stages")

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
        constants = {name: value for name, value in keywords.items() if name not in options}
        made.append(Launch(kernel, grid, arguments, constants, {}))
        launch(kernel, grid, *arguments, **keywords)

    for stem in STEMS:
        monkeypatch.setattr(import_module(f"alexkern.ops.{stem}"), "launch", record)
    return made


@pytest.fixture
def guard_bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Allocate every result inside a larger buffer and check that its margins stay untouched."""
    margin, sentinel = 4096, 77
    buffers: list[Tensor] = []

    def guarded(*arguments: Any, **keywords: Any) -> Tensor:
        result = empty(*arguments, **keywords)
        buffer = torch.full((result.numel() + 2 * margin,), sentinel).to(result)
        buffers.append(buffer)
        inside = buffer.as_strided(result.shape, result.stride(), margin)
        return inside.copy_(result)

    for stem in STEMS:
        monkeypatch.setattr(import_module(f"alexkern.ops.{stem}"), "empty", guarded)
    yield buffers
    assert buffers
    for buffer in buffers:
        assert (buffer[:margin] == sentinel).all()
        assert (buffer[-margin:] == sentinel).all()
