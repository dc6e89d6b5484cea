import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    LAYOUTS,
    check_dropout,
    check_format,
    check_refusal,
    check_same,
    leaves,
)

import alexkern
from alexkern import ops, reference
from alexkern.runtime.config import shipped_configurations

WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as published (Salmon et al. 2011), in Python's integers."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = second >> 32 ^ b ^ low, second & WORD, first >> 32 ^ d ^ high, first & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return a, b, c, d


def words(indices, seed: int) -> list[int]:
    """The documented random word of each index."""
    seed %= 2**64
    result = []
    for index in indices:
        counter = index // 4
        key = (seed & WORD, seed >> 32)
        result.append(philox((counter & WORD, counter >> 32, 0, 0), key)[index % 4])
    return result


def seed_of(value: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


def mask(shape, seed, p=0.5, layout="nchw", **place):
    """Kept elements, as the op shows them on a tensor of ones."""
    ones = torch.ones(shape, device=seed.device)
    if layout == "channels_last":
        ones = ones.movedim(1, -1).contiguous().movedim(-1, 1)
    output = ops.dropout(ones, p, mode="paper", seed=seed, **place)
    check_format(output, ones)
    return output == 1


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (WORD, WORD, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(counter, key, expected):
    """Random123's published vectors."""
    assert philox((counter,) * 4, (key,) * 2) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_reference_philox(seed):
    counters = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62]
    got = reference.philox4x32(torch.tensor(counters), torch.tensor(seed))
    key = (seed % 2**64 & WORD, seed % 2**64 >> 32)
    wanted = [philox((counter & WORD, counter >> 32, 0, 0), key) for counter in counters]
    assert list(zip(*(word.tolist() for word in got), strict=True)) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 4, 5, 2**34 - 6, 2**40 + 1])
@pytest.mark.parametrize("seed", [0, -1, 0x123456789ABCDEF])
def test_mask_is_the_documented_one(device, backend, seed, offset, layout):
    shape, p = (2, 3, 5, 3), 0.3
    expected = [word >= round(p * 2**32) for word in words(range(offset, offset + 90), seed)]
    kept = mask(shape, seed_of(seed, device), p, layout, index_offset=offset)
    assert kept.flatten().tolist() == expected


@pytest.mark.parametrize("p", [0.5, 1e-9, 1 - 1e-9, 1 / 3, words([20], 7)[0] / 2**32])
def test_threshold(device, backend, p):
    """The last p is exactly a word's threshold, which keeps its element."""
    expected = [word >= round(p * 2**32) for word in words(range(64), 7)]
    assert mask((64,), seed_of(7, device), p).tolist() == expected


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 13), (2, 8, 3, 4), (2, 3, 2, 3, 2)], ids=str)
def test_backends_agree(device, shape):
    seed = seed_of(11, device)
    with alexkern.use_backend("torch"):
        expected = mask(shape, seed)
    with alexkern.use_backend("triton"):
        assert torch.equal(mask(shape, seed), expected)
        if len(shape) > 2:
            assert torch.equal(mask(shape, seed, layout="channels_last"), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_see_the_mask_of_the_whole(device, backend, layout):
    shape, seed = (6, 8, 3, 2), seed_of(3, device)
    whole, row, plane = mask(shape, seed), 48, 6
    rows = mask((2, 8, 3, 2), seed, layout=layout, index_offset=3 * row)
    assert torch.equal(rows, whole[3:5])
    columns = mask((6, 3, 3, 2), seed, layout=layout, index_offset=5 * plane, row_stride=row)
    assert torch.equal(columns, whole[:, 5:])
    tile = {"index_offset": row + 4 * plane, "row_stride": row}
    assert torch.equal(mask((3, 4, 3, 2), seed, layout=layout, **tile), whole[1:4, 4:])
    same = mask((4, 8, 3, 2), seed, layout=layout, row_stride=0)
    assert torch.equal(same, whole[:1].expand(4, -1, -1, -1))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(device, triton, p):
    count = 200_000
    kept = mask((count,), seed_of(5, device), p).double()
    deviation = 5 * math.sqrt(p * (1 - p) / count)
    assert abs(float(kept.mean()) - (1 - p)) < deviation
    # neighbours, words of one counter and counters are independent
    for lag in (1, 2, 3, 4, 1024):
        both = float((kept[lag:] * kept[:-lag]).mean())
        assert abs(both - (1 - p) ** 2) < 5 * math.sqrt((1 - p) ** 2 / (count - lag))


def test_other_seed_other_mask(device, triton):
    masks = [mask((4096,), seed_of(seed, device)) for seed in (0, 1, 2**32, -1)]
    for one, other in itertools.combinations(masks, 2):
        # they agree on half of the elements, within 5 sigma
        assert abs(int((one == other).sum()) - 2048) < 5 * 32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["inverted", "paper"])
@pytest.mark.parametrize("p", [0.5, 0.3, 1.0])
def test_values(randn, device, backend, p, mode, dtype, layout):
    input = randn(3, 8, 5, 2, dtype=dtype, layout=layout)
    check_dropout(input, seed_of(1, device), p, mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paper(randn, device, backend, dtype):
    check_dropout(randn(2, 4096, dtype=dtype), seed_of(1, device))


@st.composite
def dropouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    layout = draw(st.sampled_from(LAYOUTS)) if len(shape) > 2 else "nchw"
    place = {
        "index_offset": draw(st.integers(0, 2**40)),
        "row_stride": draw(st.none() | st.integers(0, 2**20)),
    }
    seed = draw(st.integers(-(2**63), 2**63 - 1))
    p, mode = draw(st.floats(0.01, 1.0)), draw(st.sampled_from(["inverted", "paper"]))
    return shape, draw(st.sampled_from(DTYPES)), layout, seed, p, mode, place


def check_case(randn, device, case):
    shape, dtype, layout, seed, p, mode, place = case
    with alexkern.use_backend("triton"):
        input = randn(*shape, dtype=dtype, layout=layout)
        check_dropout(input, seed_of(seed, device), p, mode, **place)


@given(dropouts())
def test_any(randn, device, case):
    check_case(randn, device, case)


@pytest.mark.slow
@settings(max_examples=400)
@given(dropouts())
def test_any_long(randn, device, case):
    check_case(randn, device, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 16, 10), (3, 7, 11, 13)], ids=str)
@pytest.mark.parametrize("offset", [0, 2])
def test_shipped_configurations(randn, device, triton, offset, shape, layout):
    with shipped_configurations():
        input = randn(*shape, dtype=torch.float16, layout=layout)
        check_dropout(input, seed_of(9, device), index_offset=offset)


def test_same_mask_in_backward(randn, backend):
    (ours,) = leaves(torch.ones_like(randn(5, 7, 3)))
    output = ops.dropout(ours, 0.4)
    output.sum().backward()
    check_same(ours.grad, output.detach())


def test_special_values(device, backend):
    """A product, not a selection: dropped NaN and infinities are NaN, zeros keep their sign."""
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, -3.0, 5.0])
    input = values.to(device).repeat(40)
    seed = seed_of(2, device)
    kept = mask(input.shape, seed)
    assert 0 < kept[:40].sum() < 40
    check_same(ops.dropout(input, 0.5, seed=seed), input * (kept * 2.0))


def test_manual_seed(randn, backend):
    input = randn(64, 64)
    torch.manual_seed(0)
    first, second = ops.dropout(input), ops.dropout(input)
    state = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(ops.dropout(input), first)
    assert torch.equal(ops.dropout(input), second)
    assert torch.equal(torch.rand(1), state)
    assert not torch.equal(first, second)
    if input.device.type == "cpu":
        torch.manual_seed(0)
        assert not torch.equal(torch.rand(1), state)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", ["inverted", "paper"])
def test_nothing_to_drop(randn, backend, launches, mode, inplace):
    input = randn(4, 5)
    before = input.clone()
    assert ops.dropout(input, 0.0, inplace=inplace, mode=mode) is input
    output = ops.dropout(input, 0.25, training=False, inplace=inplace, mode=mode)
    assert (output is input) == (inplace or mode == "inverted")
    check_same(output, before * 0.75 if mode == "paper" else before)
    assert not launches


@pytest.mark.parametrize("mode", ["inverted", "paper"])
def test_dropping_everything(randn, backend, mode):
    (ours,) = leaves(randn(4, 5))
    output = ops.dropout(ours, 1.0, mode=mode)
    check_same(output.detach(), ours.detach() * 0.0)
    output.sum().backward()
    check_same(ours.grad, torch.zeros_like(ours))


@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed"])
def test_inplace(randn, device, backend, layout):
    input = randn(2, 3, 4, 5, layout="channels_last" if layout == "channels_last" else "nchw")
    input = input.mT if layout == "transposed" else input
    seed = seed_of(4, device)
    expected = ops.dropout(input, seed=seed)
    version = input._version
    assert ops.dropout(input, inplace=True, seed=seed) is input
    check_same(input, expected)
    assert input._version > version


def test_inplace_under_autograd(randn, device, backend):
    seed = seed_of(4, device)
    ours, theirs = leaves(randn(4, 6), randn(4, 6))
    twice = ours * 2
    output = ops.dropout(twice, inplace=True, seed=seed)
    assert output is twice
    output.sum().backward()
    ops.dropout(theirs * 2, seed=seed).sum().backward()
    check_same(ours.grad, theirs.grad)


def test_inplace_on_a_view(randn, device, backend):
    seed = seed_of(4, device)
    ours, theirs = leaves(randn(4, 6), randn(4, 6))
    for leaf in (ours, theirs):
        base = leaf * 2
        if leaf is ours:
            ops.dropout(base[1:3], inplace=True, seed=seed)
        else:
            base = torch.cat([base[:1], ops.dropout(base[1:3], seed=seed), base[3:]])
        base.square().sum().backward()
    check_same(ours.grad, theirs.grad)


def test_inplace_is_noticed_by_autograd(randn, backend):
    (ours,) = leaves(randn(4, 6))
    output = ours.exp()
    ops.dropout(output, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("view", [False, True])
def test_inplace_on_a_leaf_changes_nothing(randn, backend, view):
    (leaf,) = leaves(randn(4, 6))
    before = leaf.detach().clone()
    for call in (F.dropout, ops.dropout):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            call(leaf[1:3] if view else leaf, inplace=True)
        check_same(leaf.detach(), before)


def test_inplace_on_overlapping_memory(randn, device):
    input = randn(1, 6).expand(4, 6)
    check_refusal(F.dropout, ops.dropout, "single memory location", input, inplace=True)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_refuses_bad_probabilities(randn, p):
    check_refusal(F.dropout, ops.dropout, str(p), randn(3), p)
    check_refusal(F.dropout, ops.dropout, str(p), randn(3), p, False)


def test_refuses_integers(device):
    check_refusal(F.dropout, ops.dropout, "int64", torch.ones(3, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"mode": "spatial"}, "spatial"),
        ({"index_offset": -1}, "-1"),
        ({"row_stride": -2}, "-2"),
        ({"seed": 5}, "5"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "[2]"),
        ({"seed": torch.zeros((), dtype=torch.int32)}, "int32"),
        ({"seed": torch.zeros((), dtype=torch.int64, device="meta")}, "meta"),
    ],
    ids=str,
)
def test_refuses_its_own_arguments(backend, keys, named):
    with pytest.raises(ValueError, match="must") as raised:
        ops.dropout(torch.ones(3), **keys)
    assert named in str(raised.value)


def test_autocast_keeps_the_dtype(randn, backend, device):
    input = randn(2, 5, dtype=torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.dropout(input).dtype == torch.bfloat16
        assert ops.dropout(input.float()).dtype == torch.float32
