"""The launch door, allocations, layouts and block sizes."""

from importlib import import_module

import pytest
import torch

from alexkern import ops
from alexkern.runtime import config, launch, layout


def test_different_devices_are_refused(triton, randn, device):
    weight = torch.empty(4, 3, 3, 3, device="meta")
    with pytest.raises(RuntimeError, match=f"two devices, {device}.* and meta"):
        ops.conv2d_bias_relu(randn(1, 3, 5, 5), weight)
    bias = torch.empty(4, device="meta")
    with pytest.raises(RuntimeError, match=f"two devices, {device}.* and meta"):
        ops.conv2d_bias_relu(randn(1, 3, 5, 5), randn(4, 3, 3, 3), bias)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_need_not_be_the_tensors(triton, randn):
    image = randn(1, 4, 5, 5)
    with torch.cuda.device(0):
        moved = ops.local_response_norm(image.to("cuda:1"), 5)
    assert torch.equal(moved.cpu(), ops.local_response_norm(image, 5).cpu())


def test_recorded_backward(triton):
    """The whole host path runs on `meta`, in the configurations that a GPU gets."""
    image = torch.empty(2, 8, 6, 6, device="meta", requires_grad=True)
    weight = torch.empty(4, 8, 3, 3, device="meta", requires_grad=True)
    with launch.record_launches() as launches:
        output = ops.conv2d_bias_relu(image, weight)
        output.backward(torch.empty_like(output))
    names = [made.kernel.__name__ for made in launches]
    assert names == ["conv2d", "conv2d_epilogue_backward", "conv2d", "conv2d_weight_grad"]
    blocks = config.matmul(image, image, 1, 8, 32, 4, 72, summed=False)
    assert launches[0].constants["BLOCK_M"] == blocks.block_m
    assert launches[0].options["num_warps"] == blocks.num_warps


def test_meta_tensors_launch_nothing_unless_recorded(triton, launches):
    image = torch.empty(2, 3, 8, 8, device="meta")
    assert ops.local_response_norm(image, 5).is_meta
    assert not launches
    with launch.record_launches() as launches:
        output = ops.local_response_norm(image, 5)
    assert output.shape == image.shape
    assert [made.kernel.__name__ for made in launches] == ["lrn_forward"]
    assert launches[0].constants["INT64"] is False


def test_offsets_are_64_bit_where_32_do_not_reach(triton):
    large = torch.empty(2, 1, 2**15, 2**15 + 1, device="meta")
    with launch.record_launches() as launches:
        ops.local_response_norm(large, 3)
        ops.max_pool2d(large, 2)
        ops.dropout(large)
    assert [made.constants["INT64"] for made in launches] == [True, True, True]


def test_offsets_count_strides_not_elements():
    large = torch.empty(2**31 + 3, device="meta")
    assert launch._is_long(large.as_strided((2, 3), (2**31, 1)))
    assert not launch._is_long(large[-6:].view(2, 3))


def test_an_empty_grid_launches_nothing():
    launch.launch(None, (0,), torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64], ids=str)
def test_allocations_are_poisoned(device, dtype):
    like = torch.empty(1, device=device)
    result = launch.empty((2, 3, 4, 5), like, dtype, channels_last=True)
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    torch.testing.assert_close(result, torch.full_like(result, expected), equal_nan=True)


def test_old_interpreter_with_new_numpy_is_refused(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(import_module("numpy"), "__version__", "2.4.1")
    with pytest.raises(RuntimeError, match=r"triton 3.6.0 .* numpy 2.4.1; install 'numpy<2.4'"):
        launch._check_interpreter_numpy()


class TestLayout:
    def test_dense_layouts_are_taken_as_they_are(self):
        for tensor in (
            torch.empty(2, 3, 4, 5),
            torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.empty(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
            torch.empty(2, 5, 3).movedim(-1, 1),
            torch.empty(7),
        ):
            assert layout.dense(tensor) is tensor

    def test_other_strides_are_copied_once(self):
        for tensor in (
            torch.empty(2, 3, 4, 5).transpose(2, 3),
            torch.empty(2, 3, 4, 10)[..., ::2],
            torch.empty(3, 1, 1).expand(2, 3, 4, 5),
        ):
            copy = layout.dense(tensor)
            assert copy.is_contiguous()
            assert copy is not tensor

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_dense_as(self, channels_last):
        value = torch.arange(120.0).view(2, 3, 4, 5)
        result = layout.dense_as(value.transpose(2, 3), channels_last)
        assert torch.equal(result, value.transpose(2, 3))
        assert layout.is_channels_last(result) == channels_last

    def test_outer_channels_inner(self):
        value = torch.empty(2, 3, 4, 5)
        channels_last = value.to(memory_format=torch.channels_last)
        assert layout.outer_channels_inner(value) == (2, 3, 20)
        assert layout.outer_channels_inner(channels_last) == (40, 3, 1)

    @pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1)])
    def test_dense_in_both_orders_counts_as_contiguous(self, shape):
        value = torch.empty(shape).to(memory_format=torch.channels_last)
        assert not layout.is_channels_last(value)
        assert layout.outer_channels_inner(value) == (*shape[:2], shape[2] * shape[3])
        assert layout.dense_as(value, True).data_ptr() == value.data_ptr()

    @pytest.mark.parametrize("precision", ["tf32", "ieee"])
    def test_convolution_precision_follows_torch(self, precision):
        torch.backends.cudnn.conv.fp32_precision = precision  # a fixture restores it
        assert layout.convolution_fp32_precision() == precision


class TestConfig:
    def test_interpreter_gets_larger_blocks_unless_the_shipped_are_asked_for(self):
        image = torch.empty(2**16)
        assert config.pointwise(image, 8).block == 2**16
        with config.shipped_configurations():
            shipped = config.pointwise(image, 8)
        assert shipped == config.pointwise(image.to("meta"), 8)
        assert shipped.block < 2**16

    @pytest.mark.parametrize("divisible", [8, 24, 7, 12])
    def test_vectors_divide(self, divisible):
        blocks = config.pointwise(torch.empty(1, device="meta"), divisible)
        assert divisible % blocks.vector == 0
        assert blocks.programs(1025) == (2,)

    def test_blocks_stay_within_tritons_limit(self):
        for extents in [(10**6, 4, 10**5), (10**5, 10**5, 10**5), (3, 5, 7)]:
            pixel = torch.empty(1, 1, 1, 1)
            tile = config.matmul(pixel, pixel, 1, 3, *extents, summed=False)
            m, n, k = tile.block_m, tile.block_n, tile.block_k
            assert min(m, n, k) >= 16
            assert max(m * n, m * k, n * k) <= 2**20

    def test_the_tile_wastes_little_and_keeps_all_multiprocessors_busy(self):
        def tile(groups, m, n, k, summed=False):
            source = torch.empty(2, 64, 3, 3, dtype=torch.float16, device="meta")
            source = source.to(memory_format=torch.channels_last)
            return config.matmul(source, source, groups, 64, m, n, k, summed=summed)

        assert tile(2, 93312, 128, 1200).block_m == 256  # loads least per product
        assert tile(2, 93312, 48, 3200).block_n == 64
        assert tile(1, 169, 384, 2304).block_m == 64  # one image
        assert tile(1, 96, 432, 387200, summed=True).block_n == 256

    def test_splits_leave_work_for_each(self):
        gpu = torch.empty(1, device="meta")
        assert config.column_splits(gpu, 1, 100, 32, 4) == 1
        assert config.column_splits(gpu, 2, 10**6, 32, 4) == 528
        assert config.column_splits(gpu, 10**4, 10**6, 32, 4) == 1
        assert config.product_splits(gpu, 1, 100, 32) == 1
        assert config.product_splits(gpu, 1, 10**6, 32) == 132
        assert config.product_splits(gpu, 1000, 10**6, 32) == 1
        # 27 tiles: 9 times as many fill 132 multiprocessors twice better than 4 times once
        assert config.product_splits(gpu, 27, 10**6, 32) == 9
