import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, check_linear, check_refusal, check_same, leaves, plain_linear

import alexkern
from alexkern import ops
from alexkern.runtime.config import shipped_configurations

# input [*, in_features], out_features
SHAPES = {
    "primes": ((7, 5), 13),
    "one unit": ((5, 3), 1),
    "one input": ((4, 1), 6),
    "one row": ((1, 9), 8),
    "no rows": ((9,), 12),
    "leading dimensions": ((3, 2, 5, 4), 10),
    "vectors of 8": ((9, 16), 24),
}
ACTIVATIONS = ["relu", "none"]


def operands(randn, input_shape, units, dtype=torch.float32):
    """Random operands; the weight is scaled so that outputs have about unit variance."""
    weight = randn(units, input_shape[-1], dtype=dtype, seed=1) / math.sqrt(input_shape[-1])
    return randn(*input_shape, dtype=dtype), weight, randn(units, dtype=dtype, seed=2)


def seed_of(value: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paper(randn, device, triton, dtype):
    check_linear(*operands(randn, (3, 4096), 4096, dtype), seed_of(1, device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape(randn, device, backend, shape, dtype, activation):
    tensors = operands(randn, *SHAPES[shape], dtype)
    check_linear(*tensors, seed_of(3, device), 0.3, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["inverted", "paper"])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_factor_without_bias(randn, device, backend, p, mode, training, activation):
    input, weight, _ = operands(randn, (6, 5), 12)
    check_linear(input, weight, None, seed_of(2, device), p, training, activation, mode)


@st.composite
def layers(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    place = {
        "index_offset": draw(st.sampled_from([0, 4]) | st.integers(0, 2**40)),
        "row_stride": draw(st.none() | st.integers(0, 2**20)),
    }
    keys = {
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "p": draw(st.floats(0.0, 1.0)),
        "training": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "mode": draw(st.sampled_from(["inverted", "paper"])),
    }
    has_bias, dtype = draw(st.booleans()), draw(st.sampled_from(DTYPES))
    return (shape, draw(st.integers(1, 20)), dtype), has_bias, keys | place


def check_layer(randn, device, case):
    tensors, has_bias, keys = case
    input, weight, bias = operands(randn, *tensors)
    keys["seed"] = seed_of(keys["seed"], device)
    with alexkern.use_backend("triton"):
        check_linear(input, weight, bias if has_bias else None, **keys)


@given(layers())
def test_any(randn, device, case):
    check_layer(randn, device, case)


@pytest.mark.slow
@settings(max_examples=400)
@given(layers())
def test_any_long(randn, device, case):
    check_layer(randn, device, case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "units"), [(70, 136), (101, 67)])
def test_shipped_configurations(randn, device, triton, launches, rows, units, dtype, activation):
    with shipped_configurations():
        tensors = operands(randn, (rows, 24), units, dtype)
        check_linear(*tensors, seed_of(9, device), activation=activation)
    grids = {made.kernel.fn.__name__: made.grid for made in launches}
    assert grids["linear_epilogue"][0] > 1
    assert min(grids["linear_epilogue_backward"]) > 1


@pytest.mark.parametrize("shape", [(40,), (6, 8), (4, 3, 7), (2, 3, 2, 8)], ids=str)
@pytest.mark.parametrize(
    "place",
    [{}, {"index_offset": 8}, {"index_offset": 2**40 + 3}, {"row_stride": 640}],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mask_is_that_of_dropout(device, backend, activation, place, shape):
    """In forward and in backward: a layer whose units are all 1 before dropout."""
    seed = seed_of(12, device)
    ones = torch.ones(shape, device=device)
    expected = ops.dropout(ones, 0.3, seed=seed, **place)
    (bias,) = leaves(torch.ones(shape[-1], device=device))
    input, weight = torch.zeros(*shape[:-1], 5), torch.zeros(shape[-1], 5)
    layer = ops.linear_bias_relu_dropout
    keys = {"activation": activation, "seed": seed, **place}
    output = layer(input.to(device), weight.to(device), bias, 0.3, **keys)
    check_same(output.detach(), expected)
    assert 0 < (expected == 0).sum() < expected.numel()
    (grad,) = torch.autograd.grad(output, bias, torch.ones_like(output))
    total = expected.double().view(-1, shape[-1]).sum(0)
    torch.testing.assert_close(grad.double(), total, rtol=1e-6, atol=0)


def test_manual_seed(randn, backend):
    tensors = operands(randn, (16, 8), 64)
    torch.manual_seed(0)
    first, second = (ops.linear_bias_relu_dropout(*tensors, activation="none") for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(ops.linear_bias_relu_dropout(*tensors, activation="none"), first)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    product = F.linear(*tensors)
    check_same(ops.dropout(product), first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.3, False)])
@pytest.mark.parametrize("mode", ["inverted", "paper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_drop(
    randn, backend, launches, monkeypatch, dtype, mode, p, training, activation
):
    """No seed is drawn, and the output is that of PyTorch, to the bit but for a product."""
    monkeypatch.setattr(torch, "randint", None)
    tensors = operands(randn, (6, 9), 24, dtype)
    output = ops.linear_bias_relu_dropout(*tensors, p, training, activation, mode=mode)
    factor = 0.7 if mode == "paper" and not training else 1.0
    if factor == 1.0 or backend == "torch" or dtype != torch.bfloat16:  # see numerics.py
        check_same(output, plain_linear(*tensors, factor, activation))
    made = [made.constants["DROP"] for made in launches]
    assert made == [False] * (backend == "triton" and (activation == "relu" or factor != 1.0))


def test_the_sum_is_rounded_once(randn, device, triton):
    """Bias and products cancel: what is left is what F.linear leaves."""
    input, weight, _ = operands(randn, (4, 64), 1, torch.float16)
    bias = -F.linear(input[:1], weight).view(1)
    output = ops.linear_bias_relu_dropout(input[:1], weight, bias, 0.0, activation="relu")
    check_same(output, F.linear(input[:1], weight, bias).relu())


class Products(torch.autograd.profiler.profile):
    """Counts matrix products."""

    @property
    def count(self):
        return sum(event.name in ("aten::mm", "aten::addmm") for event in self.function_events)


@pytest.mark.parametrize("needs_bias", [False, True])
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_what_is_needed(
    randn, triton, launches, activation, needs_input, needs_weight, needs_bias
):
    """One product and one kernel; then one kernel, the sum, and a product per gradient."""
    wanted = (needs_input, needs_weight, needs_bias)
    tensors = operands(randn, (6, 5), 8)
    for tensor, needed in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(needed)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, Products() as products:
        output = ops.linear_bias_relu_dropout(*tensors, activation=activation)
    assert products.count == 1
    assert [made.kernel.fn.__name__ for made in launches] == ["linear_epilogue"]
    assert output.requires_grad == any(wanted)
    saved = [tensors[0]] * needs_weight + [tensors[1]] * needs_input
    if any(wanted):
        saved.append(output if activation == "relu" else launches[0].arguments[1])
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in saved]
    launches.clear()
    if any(wanted):
        with Products() as products:
            output.sum().backward()
    assert products.count == needs_input + needs_weight or not any(wanted)
    assert [tensor.grad is not None for tensor in tensors] == list(wanted)
    expected = ["linear_epilogue_backward"] * any(wanted) + ["sum_partials"] * needs_bias
    assert [made.kernel.fn.__name__ for made in launches] == expected


def test_relu_at_nan_and_zero(device, backend):
    """The gradient passes at NaN and stops at zero, as in torch.relu; -0.0 stays -0.0."""
    values = torch.tensor([math.nan, 0.0, -0.0, 1e-40, -1e-40, math.inf, -math.inf, 2.0])
    values = values.to(device).view(-1, 1)
    one = torch.ones(1, 1, device=device)
    ours, theirs = leaves(values, values)
    output, expected = ops.linear_bias_relu_dropout(ours, one, None, 0.0), F.relu(theirs)
    (grad,) = torch.autograd.grad(output, ours, torch.ones_like(output))
    (expected_grad,) = torch.autograd.grad(expected, theirs, torch.ones_like(expected))
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())
    check_same(grad, expected_grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(device, backend, activation):
    """A product, not a selection: dropped NaN and infinities are NaN, as in PyTorch."""
    bias = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 10, device=device)
    zeros = torch.zeros(1, 3, device=device), torch.zeros(40, 3, device=device)
    seed = seed_of(2, device)
    keeps = ops.dropout(torch.ones(1, 40, device=device), seed=seed)
    output = ops.linear_bias_relu_dropout(*zeros, bias, activation=activation, seed=seed)
    check_same(output, plain_linear(*zeros, bias, keeps, activation))


def test_autocast(randn, backend, device):
    tensors = leaves(*operands(randn, (6, 5), 8))
    seed = seed_of(4, device)
    with torch.autocast(device.type, torch.bfloat16):
        output = ops.linear_bias_relu_dropout(*tensors, seed=seed)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert [tensor.grad.dtype for tensor in tensors] == [torch.float32] * 3
    low = leaves(*(tensor.bfloat16() for tensor in tensors))
    expected = ops.linear_bias_relu_dropout(*low, seed=seed)
    expected.sum().backward()
    check_same(output.detach(), expected.detach())
    for tensor, cast in zip(tensors, low, strict=True):
        check_same(tensor.grad, cast.grad.float())


def test_strided_operands(randn, device, backend):
    input, weight, bias = operands(randn, (6, 8), 12)
    seed = seed_of(6, device)
    check_linear(input.t().contiguous().t(), weight[:, ::2].repeat(1, 2), bias[:1].expand(12), seed)
    check_linear(input.expand(3, 6, 8).transpose(0, 1), weight[:1].expand(12, 8), bias, seed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_replays_fresh_masks(randn, triton):
    tensors = leaves(*operands(randn, (64, 24), 64))

    def step():
        output = ops.linear_bias_relu_dropout(*tensors, activation="none")
        return output, *torch.autograd.grad(output.sum(), tensors)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, *_, bias_grad = step()
    seen = []
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(bias_grad, 2.0 * (output != 0).sum(0))
        seen.append(output.clone())
    assert not torch.equal(*seen)


MATRIX, WEIGHT = (3, 4), (6, 4)


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "bias_shape", "named"),
    [
        ((3, 5), WEIGHT, None, "[3, 5]"),
        ((2, 3, 5), WEIGHT, None, "[2, 3, 5]"),
        ((), WEIGHT, None, "[]"),
        (MATRIX, (6, 4, 1), None, "[6, 4, 1]"),
        (MATRIX, WEIGHT, (5,), "[5]"),
        (MATRIX, WEIGHT, (6, 1), "[6, 1]"),
    ],
    ids=str,
)
def test_refuses_what_torch_refuses(device, input_shape, weight_shape, bias_shape, named):
    shapes = (input_shape, weight_shape, bias_shape)
    tensors = [None if shape is None else torch.zeros(shape, device=device) for shape in shapes]
    check_refusal(F.linear, ops.linear_bias_relu_dropout, named, *tensors)


def test_refuses_mixed_dtypes(device):
    matrix, weight = torch.zeros(MATRIX, device=device), torch.zeros(WEIGHT, device=device)
    check_refusal(F.linear, ops.linear_bias_relu_dropout, "float16", matrix, weight.half())
    bias = torch.zeros(6, device=device).double()
    check_refusal(F.linear, ops.linear_bias_relu_dropout, "float64", matrix, weight, bias)


@pytest.mark.parametrize(
    ("weight_shape", "bias_shape"), [((4,), None), (WEIGHT, (1,)), (WEIGHT, (3, 6))], ids=str
)
def test_refuses_what_torch_would_broadcast(device, backend, weight_shape, bias_shape):
    bias = None if bias_shape is None else torch.zeros(bias_shape, device=device)
    tensors = torch.zeros(MATRIX, device=device), torch.zeros(weight_shape, device=device), bias
    assert F.linear(*tensors).isfinite().all()
    with pytest.raises(RuntimeError, match="but got"):
        ops.linear_bias_relu_dropout(*tensors)


def test_refuses_integers_to_drop_from(device, backend):
    ones = torch.ones(3, 3, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="int64"):
        ops.linear_bias_relu_dropout(ones, ones)
    check_same(ops.linear_bias_relu_dropout(ones, -ones, None, 0.0), ones * 0)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_refuses_bad_probabilities(randn, p):
    def theirs(*tensors):
        return F.dropout(F.linear(*tensors), p)

    def ours(*tensors):
        return ops.linear_bias_relu_dropout(*tensors, p)

    check_refusal(theirs, ours, str(p), *operands(randn, (3, 4), 5))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"activation": "gelu"}, "gelu"),
        ({"mode": "spatial"}, "spatial"),
        ({"index_offset": -1}, "-1"),
        ({"row_stride": -2}, "-2"),
        ({"seed": 5}, "5"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "[2]"),
    ],
    ids=str,
)
def test_refuses_its_own_arguments(backend, keys, named):
    with pytest.raises(ValueError, match="must") as raised:
        ops.linear_bias_relu_dropout(torch.ones(MATRIX), torch.ones(WEIGHT), **keys)
    assert named in str(raised.value)
