"""The choice of backend, and what importing costs."""

import threading

import pytest
import torch
from pages import run_python

import alexkern
from alexkern import ops
from alexkern.runtime.backend import current_backend, runs_triton


def test_innermost_block_decides(monkeypatch):
    monkeypatch.delenv("ALEXKERN_KERNELS", raising=False)
    assert current_backend() == "auto"
    with alexkern.use_backend("torch"):
        with alexkern.use_backend("triton"):
            assert current_backend() == "triton"
        assert current_backend() == "torch"
    assert current_backend() == "auto"


def test_block_ends_with_an_exception():
    with pytest.raises(KeyError), alexkern.use_backend("torch"):
        raise KeyError
    assert current_backend() == "auto"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("ALEXKERN_KERNELS", "torch")
    assert current_backend() == "torch"
    with alexkern.use_backend("triton"):
        assert current_backend() == "triton"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"auto, triton, torch, got 'cuda'"):
        alexkern.use_backend("cuda").__enter__()
    monkeypatch.setenv("ALEXKERN_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"ALEXKERN_KERNELS must be one of .* got 'fast'"):
        current_backend()


def test_other_threads_keep_their_own():
    seen = []
    with alexkern.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_dtypes_without_kernels_run_the_reference(triton, dtype):
    assert not runs_triton(torch.zeros(2, dtype=dtype))


def test_auto_runs_the_reference_on_a_cpu(launches):
    image = torch.zeros(1, 4, 3, 3)
    with alexkern.use_backend("auto"):
        ops.conv2d_bias_relu(image, torch.zeros(4, 4, 3, 3))
        ops.local_response_norm(image, 5)
        ops.max_pool2d(image, 2)
        ops.dropout(image)
    assert not launches


def test_backward_keeps_the_backend_of_forward(launches):
    image = torch.rand(1, 2, 4, 4, requires_grad=True)
    with alexkern.use_backend("triton"):
        output = ops.max_pool2d(image.to("cuda" if torch.cuda.is_available() else "cpu"), 2)
    with alexkern.use_backend("torch"):
        output.sum().backward()
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["max_pool_forward", "max_pool_backward"]


def test_import_is_light():
    heavy = ("triton", "torchvision", "sklearn", "matplotlib", "PIL")
    script = (
        "import sys, alexkern, alexkern.ops, torch\n"
        f"print([name for name in {heavy} if name in sys.modules], torch.cuda.is_initialized())"
    )
    run = run_python(script)
    assert run.stdout.split("\n")[0] == "[] False", run.stderr


CPU_CALL = (
    "import torch, alexkern, alexkern.ops as ops\n"
    "with alexkern.use_backend('triton'):\n"
    "    for _ in range(2):\n"
    "        print(ops.max_pool2d(torch.ones(1, 1, 2, 2), 2).item())\n"
)


def test_cpu_tensors_need_the_interpreter():
    run = run_python(CPU_CALL)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("RuntimeError: the triton backend got")
    assert "set TRITON_INTERPRET=1" in run.stderr


def test_interpreter_announces_itself_once():
    run = run_python(CPU_CALL, TRITON_INTERPRET="1")
    assert run.stdout == "1.0\n1.0\n", run.stderr
    lines = [line for line in run.stderr.splitlines() if "interpreter" in line]
    assert lines == ["alexkern: kernels run on the CPU in Triton's interpreter (slow)"]
