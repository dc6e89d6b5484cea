"""What every op promises alike: layouts, memory, autograd, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    DTYPES,
    LAYOUTS,
    check_conv,
    check_conv_lrn_pool,
    check_dropout,
    check_format,
    check_linear,
    check_lrn,
    check_lrn_pool,
    check_pool,
    check_same,
    inside_nans,
    leaves,
    plain_conv,
)

from alexkern import ops
from alexkern.runtime import launch
from alexkern.runtime.config import shipped_configurations

# whose result has the layout of the input
SPATIAL = ["conv", "lrn", "pool", "dropout", "lrn_pool", "conv_lrn_pool"]
STEMS = [*SPATIAL, "linear"]
WITH_WEIGHTS = ("conv", "conv_lrn_pool", "linear")
# the whole layer's kernels are those of conv and lrn_pool, and it takes the longest
MOST_QUICKLY = [
    pytest.param(s, marks=pytest.mark.slow) if s == "conv_lrn_pool" else s for s in STEMS
]
SHAPE = (2, 6, 7, 5)


@pytest.fixture
def operands(randn, device):
    """What each op takes besides its input of six channels, for the input's dtype."""

    def make(dtype=torch.float32):
        seed = torch.tensor(12, device=device)
        weight = randn(4, 3, 3, 2, dtype=dtype, seed=1) / 4
        return {"weight": weight, "bias": randn(4, dtype=dtype, seed=2), "seed": seed}

    return make


def call(stem, input, weight, bias, seed):
    """The op, on an input of six channels."""
    if stem == "conv":
        return ops.conv2d_bias_relu(input, weight, bias, stride=2, padding=1, groups=2)
    if stem == "lrn":
        return ops.local_response_norm(input, 4, 0.5)
    if stem == "pool":
        return ops.max_pool2d(input, 3, 2, 1)
    if stem == "lrn_pool":
        return ops.lrn_max_pool2d(input, 4, (2, 1), 1, alpha=0.5)
    if stem == "conv_lrn_pool":
        tail = {"size": 4, "alpha": 0.5, "kernel_size": (2, 1), "pool_stride": 1}
        return ops.conv2d_bias_relu_lrn_max_pool2d(input, weight, bias, 1, 1, groups=2, **tail)
    if stem == "linear":
        matrix = weight.flatten(1)[:, :6]
        return ops.linear_bias_relu_dropout(input.movedim(1, -1), matrix, bias, 0.4, seed=seed)
    return ops.dropout(input, 0.4, seed=seed)


def check_by_rule(stem, input, weight, bias, seed):
    if stem == "conv":
        check_conv(input, weight, bias, stride=2, padding=1, groups=2)
    elif stem == "lrn":
        check_lrn(input, 4, 0.5)
    elif stem == "pool":
        check_pool(input, 3, stride=2, padding=1)
    elif stem == "lrn_pool":
        check_lrn_pool(input, 4, (2, 1), 1, alpha=0.5)
    elif stem == "conv_lrn_pool":
        geometry = {"padding": 1, "groups": 2}
        check_conv_lrn_pool(input, weight, bias, geometry, 4, (2, 1), 1, alpha=0.5)
    elif stem == "linear":
        check_linear(input.movedim(1, -1), weight.flatten(1)[:, :6], bias, seed, 0.4)
    else:
        check_dropout(input, seed, 0.4)


def check_grads_of(stem, input, others):
    """Output, and what has a gradient: the input, and weight and bias where the op has them."""
    others = dict(others)
    wanted = leaves(input)
    if stem in WITH_WEIGHTS:
        others["weight"], others["bias"] = leaves(others["weight"], others["bias"])
        wanted += [others["weight"], others["bias"]]
    output = call(stem, wanted[0], **others)
    return output, wanted


VIEWS = {
    "transposed": lambda t: t.transpose(2, 3),
    "permuted": lambda t: t.permute(1, 0, 3, 2).repeat(3, 1, 1, 1)[:, :2].repeat(1, 3, 1, 1).mT,
    "expanded batch": lambda t: t[:1].expand(3, -1, -1, -1),
    "expanded channels": lambda t: t[:, :1].expand(-1, 6, -1, -1),
    "one value": lambda t: t[:1, :1, :1, :1].expand(SHAPE),
    "sliced batch": lambda t: t.repeat(2, 1, 1, 1)[1::2],
    "sliced channels": lambda t: t.repeat(1, 2, 1, 1)[:, 1::2],
    "sliced pixels": lambda t: t[:, :, 1:-1, 2:],
    "every other column": lambda t: t[..., ::2],
    "channels_last channels": lambda t: t.repeat(1, 2, 1, 1).to(memory_format=torch.channels_last)[
        :, 3:9
    ],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("stem", MOST_QUICKLY)
def test_views(randn, triton, operands, stem, view):
    input = VIEWS[view](randn(*SHAPE))
    before = input.clone()
    check_by_rule(stem, input, **operands())
    check_same(input, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stem", MOST_QUICKLY)
def test_misaligned_among_nans(randn, triton, operands, stem, dtype, offset, layout):
    """Nothing is read around a tensor, wherever it starts in memory."""
    others = operands(dtype)
    others["weight"] = inside_nans(others["weight"], offset)
    others["bias"] = inside_nans(others["bias"], offset)
    input = inside_nans(randn(*SHAPE, dtype=dtype, layout=layout), offset)
    assert input.storage_offset() % 4 == offset
    check_by_rule(stem, input, **others)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stem", STEMS)
def test_upstream_gradient_of_any_strides(randn, triton, operands, stem, layout):
    output, wanted = check_grads_of(stem, randn(*SHAPE, layout=layout), operands())
    upstream = randn(*output.shape, seed=7)
    expected = torch.autograd.grad(output, wanted, upstream, retain_graph=True)
    strange = (
        upstream.mT.contiguous().mT,
        inside_nans(upstream, 1),
        upstream.repeat(1, 2, 1, 1)[:, : upstream.shape[1]],
        upstream.to(memory_format=torch.channels_last),
    )
    for same in strange:
        grads = torch.autograd.grad(output, wanted, same, retain_graph=True)
        for actual, grad in zip(grads, expected, strict=True):
            check_same(actual, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stem", SPATIAL)
def test_no_copy_of_either_layout(randn, triton, operands, launches, stem, layout):
    (input,) = leaves(randn(*SHAPE, layout=layout))
    output = call(stem, input, **operands())
    assert launches[0].arguments[0].data_ptr() == input.data_ptr()
    upstream = torch.ones_like(output)
    launches.clear()
    output.backward(upstream)
    assert launches[0].arguments[0].data_ptr() == upstream.data_ptr()


@pytest.mark.parametrize("stem", STEMS)
def test_empty_batch(randn, backend, operands, stem):
    output, wanted = check_grads_of(stem, randn(0, *SHAPE[1:]), operands())
    full = call(stem, randn(*SHAPE), **operands())
    assert output.shape == (0, *full.shape[1:])
    assert output.dtype == full.dtype
    output.sum().backward()
    for tensor in wanted:
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_empty_channels_of_the_norm(backend, device):
    empty = torch.ones(2, 0, 3, 3, device=device)
    check_same(ops.local_response_norm(empty, 5), F.local_response_norm(empty, 5))


@pytest.mark.parametrize("stem", STEMS)
def test_double_precision_runs_the_reference(randn, triton, operands, launches, stem):
    check_by_rule(stem, randn(*SHAPE).double(), **operands(torch.float64))
    assert not launches


def test_integers_run_the_reference(device, triton, launches):
    image = torch.arange(2 * 6 * 9, device="cpu").view(2, 6, 3, 3)
    weight = torch.arange(4 * 6 * 4).view(4, 6, 2, 2) - 50
    check_same(ops.conv2d_bias_relu(image, weight), plain_conv(image, weight, None, "relu"))
    assert ops.local_response_norm(image, 5).dtype == F.local_response_norm(image, 5).dtype
    assert ops.lrn_max_pool2d(image, 5, 2).dtype == F.local_response_norm(image, 5).dtype
    assert not launches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize("stem", MOST_QUICKLY)
def test_guard_bands(randn, triton, operands, guard_bands, stem, shipped, dtype, layout):
    """Nothing is written around a result, and every element of it is written."""
    tensors = randn(*SHAPE, dtype=dtype, layout=layout), operands(dtype)
    if shipped:
        with shipped_configurations():
            check_by_rule(stem, tensors[0], **tensors[1])
    else:
        check_by_rule(stem, tensors[0], **tensors[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stem", STEMS)
def test_offsets_of_64_bits(randn, triton, operands, launches, monkeypatch, stem, layout):
    monkeypatch.setattr(launch, "_INT32_LIMIT", 0)
    with launch.record_launches() as recorded:
        call(stem, randn(*SHAPE), **operands())
    assert all(made.constants["INT64"] for made in recorded)
    check_by_rule(stem, randn(*SHAPE, layout=layout), **operands())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stem", MOST_QUICKLY)
def test_backward_is_deterministic(randn, triton, operands, stem, layout):
    """The same bits twice, also where sums are split."""
    size = 24 if stem == "conv_lrn_pool" else 40  # which takes long
    input = randn(2, 6, size, size, layout=layout)
    with shipped_configurations():
        output, wanted = check_grads_of(stem, input, operands())
        upstream = randn(*output.shape, seed=7)
        first = torch.autograd.grad(output, wanted, upstream, retain_graph=True)
        second = torch.autograd.grad(output, wanted, upstream)
    for one, other in zip(first, second, strict=True):
        check_same(one, other)


@pytest.mark.parametrize("linear_loss", [False, True])
@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem not in ("pool", "dropout")])
def test_double_backward_raises(randn, triton, operands, stem, linear_loss):
    """Also where another path to the operands would hide that this one is missing."""
    output, wanted = check_grads_of(stem, randn(*SHAPE), operands())
    loss = output.sum() if linear_loss else output.square().sum()
    (grad, *_) = torch.autograd.grad(loss, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad.sum() + sum(tensor.sum() for tensor in wanted)).backward()


def test_double_backward_of_pooling(randn, triton, operands):
    """Of what is linear between ties, only the gradient that arrives has a second derivative."""
    output, (input,) = check_grads_of("pool", randn(*SHAPE), operands())
    (grad,) = torch.autograd.grad(output.sum(), input, create_graph=True)
    assert not grad.requires_grad
    (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_double_backward_of_dropout(randn, triton, operands):
    """Its backward is the op itself."""
    output, (input,) = check_grads_of("dropout", randn(*SHAPE), operands())
    (grad,) = torch.autograd.grad(output.square().sum() / 2, input, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), input)
    scale = torch.tensor(1 / 0.6, dtype=torch.float32)
    check_same(second, torch.where(output != 0, scale * scale, 0.0))


@pytest.mark.parametrize("stem", STEMS)
def test_results_share_no_memory(randn, triton, operands, stem):
    others = operands()
    output, wanted = check_grads_of(stem, randn(*SHAPE), others)
    upstream = torch.ones_like(output)
    grads = torch.autograd.grad(output, wanted, upstream)
    tensors = [*wanted, others["seed"], output, upstream, *grads]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("stem", SPATIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward(randn, triton, operands, stem, dtype):
    """Exactly these tensors are kept, and no copies of them."""
    kept = []
    (input,) = leaves(randn(*SHAPE, dtype=dtype))
    others = operands(dtype)
    others["weight"].requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        output = call(stem, input, **others)
    expected = {
        "conv": [input, others["weight"], output],
        "lrn": [input],
        "pool": [torch.empty_like(output, dtype=torch.uint8)],
        "dropout": [others["seed"]],
        "lrn_pool": [input, torch.empty_like(output, dtype=torch.uint8)],
        "conv_lrn_pool": [
            input,
            others["weight"],
            input.new_empty(2, 4, 7, 6),  # the activation
            torch.empty_like(output, dtype=torch.uint8),
        ],
    }[stem]
    assert len(kept) == len(expected)
    for saved, tensor in zip(kept, expected, strict=True):
        assert saved.shape == tensor.shape
        assert saved.dtype == tensor.dtype
        assert saved.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
        made_inside = "pool" in stem and tensor is not input and tensor is not others["weight"]
        assert made_inside or saved.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("stem", STEMS)
def test_nothing_saved_without_a_gradient(randn, triton, operands, launches, stem):
    input = randn(*SHAPE)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        output = call(stem, input, **operands())
        with torch.no_grad():
            check_same(call(stem, input.requires_grad_(), **operands()), output)
    assert not output.requires_grad
    assert not kept
    if "pool" in stem:
        assert {made.constants.get("CODE", False) for made in launches} == {False}


@pytest.mark.parametrize("stem", STEMS)
def test_nan_upstream_gradient(randn, backend, operands, stem):
    """A NaN gradient spreads as it does in PyTorch: to its window and no further."""
    others = operands()
    input = randn(*SHAPE)
    output, wanted = check_grads_of(stem, input, others)
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in others.items()}
    truth, true_wanted = check_grads_of(stem, input.double(), doubles)
    upstream = torch.zeros_like(output)
    place = tuple(int(index[0]) for index in (output > 0).nonzero(as_tuple=True))
    upstream[place] = math.nan
    grads = torch.autograd.grad(output, wanted, upstream)
    truths = torch.autograd.grad(truth, true_wanted, upstream.double())
    assert truths[0].isnan().any()
    assert not truths[0].isnan().all()
    for grad, expected in zip(grads, truths, strict=True):
        assert torch.equal(grad.isnan(), expected.isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stem", SPATIAL)
def test_one_pixel_keeps_the_format(randn, triton, operands, stem, layout):
    """Where the result's format is ambiguous, the gradient still has the input's."""
    (input,) = leaves(randn(2, 6, 2, 1, layout=layout))
    call(stem, input, **operands()).sum().backward()
    check_format(input.grad, input)
