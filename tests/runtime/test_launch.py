import pytest
import torch

import alexkern
from alexkern import ops
from alexkern.runtime.config import shipped_configurations
from alexkern.runtime.launch import empty, launch, poisoned_allocations, record_launches


def test_tensors_on_two_devices(randn, triton):
    image = randn(1, 4, 5, 5)
    with pytest.raises(RuntimeError, match=r"same device.*meta"):
        ops.conv2d_bias_relu(image, torch.ones(4, 4, 3, 3, device="meta"))
    with pytest.raises(RuntimeError, match=r"same device.*meta"):
        ops.conv2d_bias_relu(image, randn(4, 4, 3, 3), torch.ones(4, device="meta"))


def test_meta_tensors_are_not_launched(triton):
    with pytest.raises(RuntimeError, match="meta"):
        ops.local_response_norm(torch.ones(1, 4, 5, 5, device="meta"), 5)


def test_empty_grid_launches_nothing():
    launch(None, (0,), torch.ones(1))
    launch(None, (3, 0), torch.ones(1))


def test_recording_replaces_launching(triton):
    """The whole host path runs on `meta`, in the configurations that a GPU gets."""
    image = torch.ones(2, 8, 6, 6, device="meta", requires_grad=True)
    weight = torch.ones(4, 8, 3, 3, device="meta", requires_grad=True)
    with record_launches() as launches:
        output = ops.conv2d_bias_relu(image, weight)
        output.backward(torch.ones_like(output))
    names = [made.kernel.fn.__name__ for made in launches]
    assert names == ["conv2d", "conv2d_epilogue_backward", "conv2d", "conv2d_weight_grad"]
    assert launches[0].constants["BLOCK_M"] == 64
    assert launches[0].options["num_warps"] == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU always gets the shipped blocks")
def test_interpreter_gets_larger_blocks(triton, launches):
    image = torch.ones(1, 4, 64, 64)
    ops.local_response_norm(image, 5)
    with shipped_configurations():
        ops.local_response_norm(image, 5)
    assert [made.grid for made in launches] == [(1,), (16,)]


@pytest.mark.parametrize("limit", [0, 2**30])
def test_64_bit_offsets_only_where_needed(triton, monkeypatch, limit):
    monkeypatch.setattr("alexkern.runtime.launch._INT32_LIMIT", limit)
    with record_launches() as launches:
        ops.max_pool2d(torch.ones(1, 1, 4, 4), 2)
    assert launches[0].constants["INT64"] == (limit == 0)


def test_64_bit_offsets_of_large_tensors(triton):
    with record_launches() as launches:
        ops.local_response_norm(torch.empty(2, 2**15, 2**15, device="meta"), 5)
        ops.local_response_norm(torch.empty(1, 2**15, 2**15, device="meta"), 5)
    assert [made.constants["INT64"] for made in launches] == [True, False]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "poison"),
    [(torch.float16, float("nan")), (torch.float32, float("nan")), (torch.uint8, 255)],
)
def test_empty(device, dtype, poison, channels_last):
    like = torch.ones(1, device=device)
    with poisoned_allocations():
        result = empty((2, 3, 4, 5), like, dtype, channels_last)
    assert result.dtype == dtype
    assert result.shape == (2, 3, 4, 5)
    expected = (60, 1, 15, 3) if channels_last else (60, 20, 5, 1)
    assert result.stride() == expected
    torch.testing.assert_close(
        result, torch.full_like(result, poison), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_on_a_device_that_is_not_current(randn):
    image = randn(1, 4, 5, 5)
    with alexkern.use_backend("triton"), torch.cuda.device(0):
        expected = ops.local_response_norm(image, 5)
        moved = ops.local_response_norm(image.to("cuda:1"), 5)
    assert torch.equal(moved.cpu(), expected.cpu())
