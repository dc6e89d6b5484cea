import itertools
import math
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, check_augment, check_same, inside_nans, plain_augment

import alexkern
from alexkern import ops
from alexkern.runtime import config, launch
from alexkern.runtime.config import shipped_configurations


@pytest.fixture
def operands(device):
    """Random images, corners (some outside), flips, mean, std and shift."""
    return lambda *sizes, **keys: make(device, *sizes, **keys)


def make(device, batch, stored, crop, shift=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).to(device)

    images = integers(0, 256, batch, *stored, 3).to(torch.uint8)
    margins = [side - part for side, part in zip(stored, crop, strict=True)]
    corners = torch.stack([integers(-1, margin + 2, batch) for margin in margins], 1)
    mean = 255 * torch.rand(*crop, 3, generator=generator).to(device)
    shifts = 12 * torch.randn(batch, 3, generator=generator).to(device) if shift else None
    return images, corners, integers(0, 2, batch).bool(), mean, 57.6, shifts


SIZES = [
    (1, (11, 11), (7, 7)),
    (5, (13, 13), (13, 13)),
    (5, (11, 14), (7, 8)),
    (2, (9, 6), (8, 1)),
    (3, (6, 20), (1, 16)),
    (2, (1, 1), (1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(operands, backend, sizes, shift, dtype):
    check_augment(*operands(*sizes, shift=shift), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("crop", [224, 227])
def test_paper(operands, triton, crop, dtype):
    check_augment(*operands(2, (256, 256), (crop, crop)), dtype=dtype)


PACKINGS = {
    "padded": ((2, 0, 0, 1), 1),
    "padded to vectors": ((0, 4, 1, 2), 1),
    "blocks of 2": ((1, 3, 0, 3), 2),
    "blocks of 3": ((0, 3, 1, 1), 3),
    "blocks of 4": ((5, 3, 1, 2), 4),
    "padding of whole blocks": ((8, 8, 8, 7), 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_packed(operands, backend, packing, shift, dtype):
    check_augment(*operands(3, (27, 26), (25, 24), shift=shift), dtype, *packing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paper_packed(operands, triton, dtype):
    check_augment(*operands(2, (256, 256), (224, 224)), dtype, (0, 4, 0, 4), 4)


@st.composite
def augmentations(draw):
    crop = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    stored = tuple(side + draw(st.integers(0, 5)) for side in crop)
    shift, seed = draw(st.booleans()), draw(st.integers(0, 99))
    std, dtype = draw(st.floats(0.1, 1000.0)), draw(st.sampled_from(DTYPES))
    return draw(st.integers(1, 6)), stored, crop, shift, seed, std, dtype, *draw(packings(crop))


@st.composite
def packings(draw, crop):
    """Padding, and blocks that divide what is padded."""
    block = draw(st.integers(1, 5))
    top, left = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    bottom = -(top + crop[0]) % block + block * draw(st.integers(0, 2))
    right = -(left + crop[1]) % block + block * draw(st.integers(0, 2))
    return (left, right, top, bottom), block


def check_case(device, case):
    *sizes, std, dtype, padding, space_to_depth = case
    images, corners, flips, mean, _, shift = make(device, *sizes)
    with alexkern.use_backend("triton"):
        check_augment(images, corners, flips, mean, std, shift, dtype, padding, space_to_depth)


@given(augmentations())
def test_any(device, case):
    check_case(device, case)


@pytest.mark.slow
@settings(max_examples=400)
@given(augmentations())
def test_any_long(device, case):
    check_case(device, case)


def test_every_view(device, backend):
    """All corners, straight and mirrored, of an image whose pixels say where they are."""
    stored, crop = (9, 8), (7, 5)
    views = list(itertools.product(range(3), range(4), (False, True)))
    places = torch.arange(9 * 8 * 3, dtype=torch.uint8, device=device).view(1, *stored, 3)
    images = places.repeat(len(views), 1, 1, 1)
    corners = torch.tensor([view[:2] for view in views], device=device)
    flips = torch.tensor([view[2] for view in views], device=device)
    output = ops.augment(images, corners, flips, torch.zeros(*crop, 3, device=device))
    for (top, left, flip), crops in zip(views, output.permute(0, 2, 3, 1).tolist(), strict=True):
        for row, column, channel in itertools.product(range(7), range(5), range(3)):
            place = left + (4 - column if flip else column)
            assert crops[row][column][channel] == ((top + row) * 8 + place) * 3 + channel


def test_where_each_value_goes(device, backend):
    """As the docstring says, for pixels that say where they are."""
    places = torch.arange(1, 7 * 9 * 3 + 1, dtype=torch.uint8, device=device).view(1, 7, 9, 3)
    corners, flips = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.tensor([False])
    mean = torch.zeros(7, 9, 3, device=device)
    packing = {"padding": (1, 2, 3, 2), "space_to_depth": 4}
    output = ops.augment(places, corners, flips.to(device), mean, **packing)
    assert output.shape == (1, 48, 3, 3)
    expected = torch.zeros_like(output)
    for row, column, channel in itertools.product(range(7), range(9), range(3)):
        below, right = row + 3, column + 1
        depth = (channel * 4 + below % 4) * 4 + right % 4
        expected[0, depth, below // 4, right // 4] = (row * 9 + column) * 3 + channel + 1
    check_same(output, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_corners_are_clamped(operands, device, backend, dtype):
    """Whatever they say, no crop leaves its image."""
    images, _, flips, mean, *_ = operands(5, (11, 14), (7, 8))
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    wild = [[low, high], [-1, 7], [5, -3], [high, low], [4, 6]]
    tame = [[0, 6], [0, 6], [4, 0], [4, 0], [4, 6]]
    outside, inside = (torch.tensor(each, dtype=dtype, device=device) for each in (wild, tame))
    expected = ops.augment(images, inside, flips, mean)
    check_same(ops.augment(images, outside, flips, mean), expected)


UNPACKED = ((0, 0, 0, 0), 1)
# of crops of (29, 24)
EITHER = pytest.mark.parametrize("packing", [UNPACKED, ((1, 3, 0, 3), 4)], ids=["plain", "packed"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "packing"),
    [
        ((5, (30, 28), (29, 24)), UNPACKED),
        ((3, (24, 27), (23, 21)), UNPACKED),
        ((5, (30, 28), (29, 24)), ((1, 3, 0, 3), 4)),
        ((3, (24, 27), (23, 21)), ((1, 2, 1, 0), 3)),
    ],
    ids=str,
)
def test_shipped_configurations(operands, triton, sizes, packing, dtype):
    """Several programs per crop: the last one is not full."""
    with shipped_configurations():
        check_augment(*operands(*sizes), dtype, *packing)


@EITHER
@pytest.mark.parametrize("images", [1, 2, 5, 8])
def test_images_per_program(operands, triton, monkeypatch, images, packing):
    monkeypatch.setattr(config, "images_per_program", lambda *_: images)
    with shipped_configurations():
        check_augment(*operands(5, (30, 28), (29, 24)), torch.float32, *packing)


def test_vectors_of_packed_pixels(operands, triton, launches):
    """16 bytes together in half precision, as 8 divides the depth of 48."""
    arguments = operands(2, (30, 28), (29, 24))
    ops.augment(*arguments, dtype=torch.bfloat16, padding=(1, 3, 0, 3), space_to_depth=4)
    assert [made.constants["VECTOR"] for made in launches] == [8]


def test_as_many_images_per_program_as_fill_the_gpu(device):
    mean = torch.empty(224, 224, 3, device=device)
    with shipped_configurations():
        assert [config.images_per_program(mean, 147, batch) for batch in (1, 8, 32, 128)] == [
            *(1, 1, 4, 8)
        ]


@EITHER
def test_offsets_of_64_bits(operands, triton, monkeypatch, packing):
    monkeypatch.setattr(launch, "_INT32_LIMIT", 0)
    arguments = operands(3, (30, 28), (29, 24))
    with launch.record_launches() as recorded:
        ops.augment(*arguments, padding=packing[0], space_to_depth=packing[1])
    assert [made.constants["INT64"] for made in recorded] == [True]
    check_augment(*arguments, torch.float32, *packing)


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shipped", [False, True])
def test_guard_bands(operands, triton, guard_bands, shipped, dtype, packing):
    arguments = operands(3, (30, 28), (29, 24))
    with shipped_configurations() if shipped else nullcontext():
        ops.augment(*arguments, dtype=dtype, padding=packing[0], space_to_depth=packing[1])


@EITHER
def test_one_launch_and_no_copy(operands, triton, launches, packing):
    arguments = operands(3, (30, 28), (29, 24))
    ops.augment(*arguments, padding=packing[0], space_to_depth=packing[1])
    (made,) = launches
    given = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    assert all(map(lambda a, b: a.data_ptr() == b.data_ptr(), made.arguments, given))


VIEWS = {
    "planes": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "every other image": lambda t: t.repeat_interleave(2, 0)[::2],
    "part of larger images": lambda t: torch.nn.functional.pad(t, (0, 0, 2, 3, 1, 0))[:, 1:, 2:-3],
    "one image": lambda t: t[:1].expand(5, -1, -1, -1),
    "misaligned": lambda t: torch.cat([t.new_tensor([9]), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_images(operands, triton, view):
    images, *others = operands(5, (11, 14), (7, 8))
    check_augment(VIEWS[view](images), *others)


def test_views_of_the_others(operands, triton):
    images, corners, flips, mean, std, shift = operands(5, (11, 14), (7, 8))
    check_augment(
        images,
        corners.repeat_interleave(2, 1)[:, ::2],
        flips.repeat_interleave(2)[::2],
        mean.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        std,
        shift.T.contiguous().T,
    )
    channel_means = torch.tensor([123.7, 116.3, 103.5], device=images.device).expand_as(mean)
    check_augment(images, corners, flips, channel_means, std, shift[:1].expand(5, 3))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_among_nans(operands, triton, offset):
    images, corners, flips, mean, std, shift = operands(5, (11, 14), (7, 8))
    check_augment(
        images, corners, flips, inside_nans(mean, offset), std, inside_nans(shift, offset)
    )


def test_nan_and_infinite_means(operands, backend):
    images, corners, flips, mean, std, _ = operands(2, (6, 6), (4, 4))
    mean[1, 2, 0], mean[3, 0, 2] = math.nan, math.inf
    output = ops.augment(images, corners, flips, mean, std)
    _, truth = plain_augment(images, corners, flips, mean, std)
    assert torch.equal(output.isnan(), truth.isnan())
    assert torch.equal(output.isneginf(), truth.isneginf())
    assert truth.isnan().sum() == truth.isneginf().sum() == 2


@pytest.mark.parametrize("space_to_depth", [1, 2])
def test_padding_is_zero_whatever_is_added(operands, device, backend, space_to_depth):
    images, corners, flips, _, std, _ = operands(2, (6, 6), (4, 4))
    mean = torch.full((4, 4, 3), math.nan, device=device)
    shift = torch.tensor([[math.inf, math.nan, -1.0]] * 2, device=device)
    packing = {"padding": (2, 2, 0, 2), "space_to_depth": space_to_depth}
    output = ops.augment(images, corners, flips, mean, std, shift, **packing)
    expected = F.pad(torch.full((2, 3, 4, 4), math.nan, device=device), (2, 2, 0, 2))
    check_same(output, F.pixel_unshuffle(expected, space_to_depth))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(operands, backend, dtype):
    output = ops.augment(*operands(0, (11, 14), (7, 8)), dtype=dtype)
    assert output.shape == (0, 3, 7, 8)
    assert output.dtype == dtype
    packing = {"padding": (0, 4, 1, 0), "space_to_depth": 4}
    packed = ops.augment(*operands(0, (11, 14), (7, 8)), dtype=dtype, **packing)
    assert packed.shape == (0, 48, 2, 3)
    assert packed.dtype == dtype


def test_nothing_is_learnt(operands, backend):
    images, corners, flips, mean, std, shift = operands(2, (6, 6), (4, 4))
    arguments = images, corners, flips, mean.requires_grad_(), std, shift.requires_grad_()
    assert not ops.augment(*arguments).requires_grad
    with torch.inference_mode():
        assert ops.augment(*arguments).is_inference()


def test_autocast_changes_nothing(operands, backend, device):
    arguments = operands(2, (6, 6), (4, 4))
    with torch.autocast(device.type, torch.bfloat16):
        check_same(ops.augment(*arguments), ops.augment(*arguments, dtype=torch.float32))
        assert ops.augment(*arguments).dtype == torch.float32


def change(index, value):
    return lambda *arguments: (*arguments[:index], value(arguments[index]), *arguments[index + 1 :])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (change(0, lambda t: t.int()), "images must be uint8 [B, H, W, 3], got torch.int32"),
        (change(0, lambda t: t[0]), "[11, 14, 3]"),
        (change(0, lambda t: t[..., :2]), "[3, 11, 14, 2]"),
        (change(0, lambda t: t[:, :6]), "crops of [7, 8], the size of mean, do not fit"),
        (change(0, lambda t: t[:, :, :7]), "do not fit images of [11, 7]"),
        (change(1, lambda t: t.float()), "got torch.float32 [3, 2]"),
        (change(1, lambda t: t[:2]), "corners must be torch.int64 or torch.int32 of shape [3, 2]"),
        (change(2, lambda t: t.int()), "flips must be torch.bool of shape [3], got torch.int32"),
        (change(2, lambda t: t[:1]), "[1]"),
        (change(3, lambda t: t.double()), "mean must be float32 [height, width, 3], got"),
        (change(3, lambda t: t[..., 0]), "[7, 8]"),
        (change(3, lambda t: t[:0]), "[0, 8, 3]"),
        (change(5, lambda t: t.half()), "shift must be torch.float32 of shape [3, 3], got"),
        (change(5, lambda t: t[0]), "got torch.float32 [3]"),
        (change(1, lambda t: t.to("meta")), "same device"),
        (change(5, lambda t: t.to("meta")), "same device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_tensors_that_do_not_fit(operands, backend, changed, named):
    arguments = changed(*operands(3, (11, 14), (7, 8)))
    with pytest.raises(RuntimeError) as raised:
        ops.augment(*arguments)
    assert named in str(raised.value)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_refuses_bad_deviations(operands, backend, std):
    images, corners, flips, mean, *_ = operands(3, (11, 14), (7, 8))
    with pytest.raises(ValueError, match=f"positive finite number, got {std}"):
        ops.augment(images, corners, flips, mean, std)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_refuses_other_dtypes(operands, backend, dtype):
    with pytest.raises(RuntimeError, match=f"got {dtype}"):
        ops.augment(*operands(3, (11, 14), (7, 8)), dtype=dtype)


@pytest.mark.parametrize(
    ("padding", "space_to_depth", "named"),
    [
        ((0, -1, 0, 0), 1, "must not be negative .* got padding=(0, -1, 0, 0)"),
        ((0, 0, 0, 0), 0, "space_to_depth must be positive, got .* and space_to_depth=0"),
        ((0, 4, 0, 0), 4, "space_to_depth=4 does not divide [7, 12], .* [7, 8] with"),
        ((0, 0, 1, 0), 3, "space_to_depth=3 does not divide [8, 8]"),
    ],
)
def test_refuses_blocks_that_do_not_fit(operands, backend, padding, space_to_depth, named):
    pattern = ".*".join(map(re.escape, named.split(".*")))
    with pytest.raises(RuntimeError, match=pattern):
        ops.augment(*operands(3, (11, 14), (7, 8)), padding=padding, space_to_depth=space_to_depth)


@pytest.mark.parametrize(
    ("padding", "space_to_depth"), [((0, 0.0, 0, 0), 1), ((0, 0), 1), ((0, 0, 1, 0), 2.0)]
)
def test_refuses_what_is_no_int(operands, backend, padding, space_to_depth):
    with pytest.raises(TypeError, match="four ints"):
        ops.augment(*operands(3, (11, 14), (7, 8)), padding=padding, space_to_depth=space_to_depth)
