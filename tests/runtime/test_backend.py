import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import Tensor

import alexkern
from alexkern import ops
from alexkern.runtime.backend import current_backend


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; None removes a variable."""
    merged = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=merged)


def test_nesting():
    outside = current_backend()
    with alexkern.use_backend("triton"):
        with alexkern.use_backend("torch"):
            assert current_backend() == "torch"
        assert current_backend() == "triton"
        with pytest.raises(KeyError), alexkern.use_backend("auto"):
            raise KeyError
        assert current_backend() == "triton"
    assert current_backend() == outside


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"triton.*{name!r}"), alexkern.use_backend(name):
        pass


def test_environment_variable(monkeypatch, randn, launches):
    monkeypatch.delenv("ALEXKERN_KERNELS", raising=False)
    assert current_backend() == "auto"
    monkeypatch.setenv("ALEXKERN_KERNELS", "triton")
    ops.max_pool2d(randn(1, 1, 4, 4), 2)
    assert len(launches) == 1
    with alexkern.use_backend("torch"):
        ops.max_pool2d(randn(1, 1, 4, 4), 2)
    assert len(launches) == 1
    monkeypatch.setenv("ALEXKERN_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"ALEXKERN_KERNELS.*'fast'"):
        current_backend()


def test_other_threads_are_not_affected(monkeypatch):
    monkeypatch.delenv("ALEXKERN_KERNELS", raising=False)
    seen = []
    with alexkern.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_auto_on_a_cpu_runs_the_reference(monkeypatch, launches):
    monkeypatch.delenv("ALEXKERN_KERNELS", raising=False)
    image = torch.ones(1, 4, 4, 4)
    ops.conv2d_bias_relu(image, torch.ones(4, 4, 3, 3))
    ops.local_response_norm(image, 5)
    ops.max_pool2d(image, 2)
    ops.dropout(image)
    assert not launches


@pytest.mark.parametrize("chosen", ["triton", "torch"])
def test_backward_keeps_the_backend_of_forward(randn, launches, chosen):
    image = randn(1, 4, 4, 4).requires_grad_()
    other = "torch" if chosen == "triton" else "triton"
    with alexkern.use_backend(chosen):
        output: Tensor = ops.local_response_norm(image, 5)
    launches.clear()
    with alexkern.use_backend(other):
        output.sum().backward()
    assert len(launches) == (2 if chosen == "triton" else 0)


def test_import_is_cheap():
    """No triton, nothing for training or figures, and no CUDA context."""
    run = run_python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import alexkern, alexkern.ops
        heavy = {"triton", "torchvision", "sklearn", "matplotlib", "PIL", "alexkern.training"}
        loaded = heavy & (set(sys.modules) - before)
        assert not loaded, loaded
        assert not torch.cuda.is_initialized()
        """
    )
    assert run.returncode == 0, run.stderr


def test_triton_on_a_cpu_needs_the_interpreter():
    run = run_python(
        """
        import torch, alexkern
        from alexkern import ops
        with alexkern.use_backend("triton"):
            try:
                ops.max_pool2d(torch.ones(1, 1, 4, 4), 2)
            except RuntimeError as error:
                print(error)
        """,
        TRITON_INTERPRET=None,
    )
    assert run.returncode == 0, run.stderr
    assert "TRITON_INTERPRET=1" in run.stdout
    assert "cpu" in run.stdout


def test_interpreter_is_announced_once():
    run = run_python(
        """
        import torch, alexkern
        from alexkern import ops
        with alexkern.use_backend("triton"):
            for _ in range(2):
                ops.max_pool2d(torch.ones(1, 1, 4, 4), 2)
        """,
        TRITON_INTERPRET="1",
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("interpreter") == 1
