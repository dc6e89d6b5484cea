"""Every step of the kernel's path computes the same."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bench import lrn_path


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


def test_what_a_step_cannot_do_is_refused() -> None:
    channels_last = torch.channels_last
    with pytest.raises(ValueError, match=r"\[1, 12, 4, 4\]"):
        lrn_path.run("step_3_roots", torch.ones(1, 12, 4, 4).to(memory_format=channels_last))
    with pytest.raises(ValueError, match="strides"):
        lrn_path.run("step_3_roots", torch.ones(1, 16, 4, 4))
