"""The ops as PyTorch's dispatcher, transforms, modes and tracers see them."""

import threading
import timeit
from functools import partial

import cases
import pytest
import torch
from cases import CASES, MOST_QUICKLY, TAIL, WHOLE, check_all_same, value_and_grads
from numerics import LAYOUTS, check_same, leaves
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from alexkern import ops, use_backend
from alexkern.runtime.launch import record_launches
from bench.bench_host import CALLS


@pytest.fixture
def operands(randn):
    return partial(cases.operands, randn)


class Seen(TorchDispatchMode):
    """Collects the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "alexkern":
            self.calls.append((function, arguments))
        return function(*arguments, **(keywords or {}))

    @property
    def names(self):
        return [function._opname for function, _ in self.calls]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MOST_QUICKLY)
def test_a_mode_sees_one_node_per_pass(triton, operands, case, layout):
    tensors = operands(layout=layout)
    expected = value_and_grads(CASES[case], *tensors)
    with Seen() as seen:
        actual = value_and_grads(CASES[case], *tensors)
    name = case.partition(" ")[0]
    assert seen.names == [name, name if name == "dropout" else f"{name}_backward"]
    check_all_same(actual, expected)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("nchw", torch.float32),
        pytest.param("channels_last", torch.float16, marks=pytest.mark.slow),
        pytest.param("nchw", torch.float16, marks=pytest.mark.slow),
        pytest.param("channels_last", torch.float32, marks=pytest.mark.slow),
        # products in the interpreter are no truth in bfloat16, but agree with themselves
        pytest.param("channels_last", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", MOST_QUICKLY)
def test_opcheck(triton, operands, case, layout, dtype):
    """Schema, autograd registration, fake tensors, and ahead-of-time autograd, of every pass."""
    with Seen() as seen:
        value_and_grads(CASES[case], *operands(dtype, layout))
    for function, arguments in seen.calls:
        forward = not function._opname.endswith("_backward")
        fresh = tuple(
            value.detach().clone().requires_grad_(forward and value.is_floating_point())
            if isinstance(value, Tensor)
            else value
            for value in arguments
        )
        torch.library.opcheck(function, fresh)


@pytest.mark.parametrize("shift", [False, True])
def test_opcheck_of_augment(triton, device, shift):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 9, 8, 3), dtype=torch.uint8, generator=generator)
    given = (
        images,
        torch.tensor([[0, 1], [2, 0]]),
        torch.tensor([True, False]),
        torch.rand(6, 5, 3, generator=generator),
        *([torch.rand(2, 3, generator=generator)] if shift else []),
    )
    given = tuple(tensor.to(device) for tensor in given)
    call = partial(ops.augment, padding=(1, 2, 0, 2), space_to_depth=2)
    call = partial(call, *given[:4], 2.0, *given[4:], dtype=torch.float16)
    with Seen() as seen:
        crops = call()
    ((function, arguments),) = seen.calls
    torch.library.opcheck(function, arguments)
    check_same(call(), crops)


@pytest.mark.parametrize("case", WHOLE)
def test_eager_calls_pass_the_dispatcher_by(triton, operands, case):
    """Plain tensors and parameters alone: everything else goes through the operator."""
    image, weight, bias = operands()

    def dispatched():
        with torch.autograd.profiler.profile() as profile:
            value_and_grads(CASES[case], image, torch.nn.Parameter(weight), bias)
        return [e.name for e in profile.function_events if e.name.startswith("alexkern::")]

    assert not dispatched()
    with Seen():
        assert dispatched()


@pytest.mark.parametrize("case", MOST_QUICKLY)
def test_fake_and_meta_tensors(triton, operands, case):
    """Shapes, dtypes and strides without data, of what the kernels would return."""
    for layout in LAYOUTS:
        tensors = operands(torch.float16, layout)
        expected = value_and_grads(CASES[case], *tensors)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in tensors]
            described = [value_and_grads(CASES[case], *fakes)]
        metas = [torch.empty_like(tensor, device="meta").requires_grad_() for tensor in tensors]
        described.append(value_and_grads(CASES[case], *metas))
        for results in described:
            for actual, real in zip(results, expected, strict=True):
                assert (actual.shape, actual.dtype) == (real.shape, real.dtype)
                assert actual.stride() == real.stride()


@pytest.mark.parametrize("case", MOST_QUICKLY)
def test_make_fx(triton, operands, case):
    tensors = operands()
    traced = make_fx(partial(value_and_grads, CASES[case]))(*tensors)
    targets = [str(node.target) for node in traced.graph.nodes if "alexkern" in str(node.target)]
    assert len(targets) == 2
    check_all_same(traced(*tensors), value_and_grads(CASES[case], *tensors))


@pytest.mark.parametrize("case", MOST_QUICKLY)
def test_transforms(triton, operands, case):
    """Gradients, per-sample gradients and functionalisation by ``torch.func``."""
    function = CASES[case]
    image, weight, bias = (tensor.detach() for tensor in operands())

    def loss(image, weight, bias):
        return function(image, weight, bias).square().sum() / 2

    (expected, *_) = value_and_grads(function, *leaves(image, weight, bias))[1:]
    check_same(torch.func.grad(loss)(image, weight, bias), expected)
    check_same(
        torch.func.functionalize(function)(image, weight, bias), function(image, weight, bias)
    )

    def alone(image):
        return loss(image[None], weight, bias)

    singles = [torch.func.grad(alone)(one) for one in image]
    batched = torch.func.vmap(torch.func.grad(alone))(image)
    check_same(batched, torch.stack(singles))


def test_nested_transforms(randn, triton):
    """Jacobians, and a gradient of a gradient that meets the op once."""
    image, other = randn(1, 3, 2, 2), randn(1, 3, 2, 2, seed=1)

    def normalise(image):
        return ops.local_response_norm(image, 3, 0.5)

    jacobian = torch.func.jacrev(normalise)(image)
    (leaf,) = leaves(image)
    values = normalise(leaf).flatten()
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
    check_same(jacobian.view(-1, *image.shape), torch.stack(rows))

    def inner(outer):
        return torch.func.grad(lambda x: (normalise(outer) * x).sum())(other).sum()

    (expected,) = torch.autograd.grad(normalise(leaf).sum(), leaf)
    check_same(torch.func.grad(inner)(image), expected)


@pytest.mark.parametrize("case", CASES)
def test_transforms_without_a_formula_raise(triton, operands, case):
    """A tangent is never dropped, nor a second derivative taken for zero."""
    function = CASES[case]
    tensors = tuple(tensor.detach() for tensor in operands())
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda image: function(image, *tensors[1:]), tensors[:1], tensors[:1])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[0], tensors[0])
        with pytest.raises(NotImplementedError, match="forward-mode"):
            function(dual, *tensors[1:])
    if case.startswith("dropout"):
        return  # whose backward is the op itself

    def squares(image):
        gradient = torch.func.grad(lambda i: function(i, *tensors[1:]).square().sum())(image)
        return gradient.sum() + image.sum()

    with pytest.raises(RuntimeError, match="double backward"):
        torch.func.grad(squares)(tensors[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_operators(triton, operands, device, dtype):
    """Those with weights cast, the others keep their input's dtype, also when called directly."""
    cast = ("conv2d_bias_relu", "linear_bias_relu_dropout", "conv2d_bias_relu_lrn_max_pool2d")
    with torch.autocast(device.type, dtype):
        for case in WHOLE:
            tensors = [tensor.detach() for tensor in operands()]
            expected = dtype if case in cast else torch.float32
            with Seen() as seen:
                assert CASES[case](*tensors).dtype == expected
            ((function, arguments),) = seen.calls
            plain = (
                a.float() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in arguments
            )
            direct = function(*plain)
            assert (direct if isinstance(direct, Tensor) else direct[0]).dtype == expected


def test_flops_are_counted(triton, operands):
    """As PyTorch counts its own convolutions and products."""
    for case in ("conv2d_bias_relu", "linear_bias_relu_dropout", "linear_bias_relu_dropout plain"):
        counts = []
        for backend in ("triton", "torch"):
            with use_backend(backend), FlopCounterMode(display=False) as counter:
                value_and_grads(CASES[case], *operands())
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_flops_of_groups(triton, operands):
    """A pass is two operations per output and weight that reach each other."""
    image, weight, bias = operands()
    layer = {"stride": 1, "padding": 1, "groups": 2}
    for call in (ops.conv2d_bias_relu, partial(ops.conv2d_bias_relu_lrn_max_pool2d, **TAIL)):
        with FlopCounterMode(display=False) as counter:
            call(image, weight[:, :4], bias, **layer).sum().backward()
        activation = 2 * 8 * 7 * 7  # images, channels, rows, columns
        assert counter.get_total_flops() == 3 * 2 * activation * 4 * 3 * 2


@pytest.mark.parametrize("case", WHOLE)
def test_checkpointing(triton, operands, case):
    """Recomputed, wholly or all but what a policy names, gradients are the same."""
    tensors = operands()
    expected = value_and_grads(CASES[case], *tensors)
    for function in (CASES[case], lambda *given: CASES[case](*given) * 1.0):
        whole = partial(checkpoint, function, use_reentrant=False)
        check_all_same(value_and_grads(whole, *tensors), expected)
    asked = []

    def policy(context, operator, *arguments, **keywords):
        asked.append(operator.namespace)
        kept = operator.namespace == "alexkern"
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    selective = partial(checkpoint, CASES[case], use_reentrant=False, context_fn=contexts)
    with Seen() as seen:
        check_all_same(value_and_grads(selective, *tensors), expected)
    assert "alexkern" in asked
    assert len(seen.names) == 2  # forward is not run again


def test_cost_on_the_host(triton):
    """An eager call takes at most half as long again as a bare autograd function around it."""
    image = torch.empty(128, 96, 27, 27, device="meta", requires_grad=True)
    names = "local_response_norm", "local_response_norm, bare"
    with record_launches() as launches:

        def seconds(call):
            return timeit.timeit(lambda: (CALLS[call](image, None), launches.clear()), number=50)

        # in turn, and many times: other load on the machine meets both
        times = [[seconds(name) for name in names] for _ in range(60)]
    ours, bare = map(min, zip(*times, strict=True))
    assert ours < 1.5 * bare


def test_lazily_negated_input(triton, device):
    """The negative bit of a view is no part of its memory."""
    values = torch.complex(torch.zeros(2, 8, 4, 4), torch.randn(2, 8, 4, 4)).to(device)
    negated = values.conj().imag
    assert negated.is_neg()
    check_same(ops.max_pool2d(negated, 2), ops.max_pool2d(negated.resolve_neg(), 2))


def test_sparse_input_is_refused(triton, device):
    sparse = torch.ones(2, 8, 4, 4, device=device).to_sparse()
    with pytest.raises(NotImplementedError, match=r"got layout torch.sparse_coo"):
        ops.max_pool2d(sparse, 2)


def test_kernel_tensors_on_threads(triton, operands):
    """Calls from several threads at once do not disturb each other."""
    tensors = operands()
    expected = {case: value_and_grads(CASES[case], *tensors) for case in WHOLE}
    failures = []

    def work(case):
        try:
            with use_backend("triton"):
                check_all_same(value_and_grads(CASES[case], *tensors), expected[case])
        except BaseException as error:
            failures.append((case, error))

    threads = [threading.Thread(target=work, args=(case,)) for case in WHOLE * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_reference_is_plain_pytorch(operands):
    """Under ``torch`` nothing hides what is computed."""
    with use_backend("torch"), Seen() as seen:
        for case in WHOLE:
            value_and_grads(CASES[case], *operands())
    assert not seen.calls
