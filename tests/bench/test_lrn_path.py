"""Every step of the kernel's path computes the same."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bench import lrn_path, report
from bench.compile_record import GPUS, CompileRecord
from bench.layers import POOLS
from bench.record import load
from bench.work import normalisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (1, 8, 3, 3), (3, 96, 4, 11)])
@pytest.mark.parametrize("step", lrn_path.STEPS)
def test_step_is_the_paper_s_lrn(
    step: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """To the rounding of the result, and of some ten operations in float32."""
    generator = torch.Generator().manual_seed(0)
    x = (10 * torch.randn(shape, generator=generator)).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    truth = F.local_response_norm(x.double(), 5, 5e-2, 0.75, 2.0)
    error = (lrn_path.run(step, x, scale=1e-2).double() - truth).abs()
    assert (error <= (torch.finfo(dtype).eps + 2.0**-20) * truth.abs()).all()


def test_the_page_s_figures() -> None:
    """Those in the text of docs/kernel-path.md; its tables are written from the record."""
    text = " ".join((report.ROOT / "docs" / "kernel-path.md").read_text("utf-8").split())
    gpu, size = GPUS["sm_90"], normalisation(POOLS["1"], "forward", 128, 2).bytes
    elements, seconds = size / 4, size / gpu.copy_bytes
    assert f"read {size / 2e6:.1f} MB and write {size / 2e6:.1f} MB. At 4.3 TB/s" in text
    assert gpu.copy_bytes == 4.3e12
    assert f"{elements / 1e6:.1f} million elements in {1e6 * seconds:.1f} us" in text
    assert (gpu.multiprocessors, gpu.clock) == (132, 1.98e9)
    budget = 132 * 4 * 32 * gpu.clock * seconds / elements
    assert f"about {budget:.0f} instructions per element" in text
    loads = {
        k.kernel: k.instructions["load_16_bytes"] + k.instructions["load_narrower"]
        for k in load(CompileRecord, report.COMPILE_RECORD).kernels
        if (k.stem, k.target, k.dtype) == ("lrn_path", "sm_90", "bf16")
    }
    assert "three loads where there were 26" in text
    assert (loads["step_3_roots"], loads["step_4_eight_channels"]) == (26, 3)


def test_what_a_step_cannot_do_is_refused() -> None:
    channels_last = torch.channels_last
    with pytest.raises(ValueError, match=r"\[1, 12, 4, 4\]"):
        lrn_path.run("step_3_roots", torch.ones(1, 12, 4, 4).to(memory_format=channels_last))
    with pytest.raises(ValueError, match="strides"):
        lrn_path.run("step_3_roots", torch.ones(1, 16, 4, 4))
