"""torch.compile and torch.export, of ops, modules and the whole network."""

import io
from collections.abc import Iterator

import cases
import pytest
import torch
from cases import CASES, WHOLE, check_all_same, value_and_grads
from numerics import check_same, leaves
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from alexkern import models, nn, ops, use_backend

NO_GPU = "no GPU: CUDA graphs replay nothing without one"


class Graphs:
    """A compiler that runs the graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=lambda graph, _: self.forward.append(graph) or graph,
            bw_compiler=lambda graph, _: self.backward.append(graph) or graph,
        )

    def compile(self, function, dynamic=None):
        return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=self.backend)


def nodes(graph: torch.fx.GraphModule) -> list[str]:
    """This project's operators in a graph."""
    targets = [str(node.target) for node in graph.graph.nodes]
    return [target.split(".")[1] for target in targets if target.startswith("alexkern.")]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("layout", "dynamic"),
    [
        ("nchw", True),
        pytest.param("channels_last", False, marks=pytest.mark.slow),
        pytest.param("channels_last", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_ops(randn, triton, graphs, case, layout, dynamic):
    """One graph for all batch sizes, one node per pass, the same bits."""
    compiled = graphs.compile(CASES[case], dynamic)
    image, *rest = cases.operands(randn, layout=layout)
    # sizes that nothing else has, which would be taken for the same by nature
    for batch in (4, 5, 10) if dynamic else (2, 2):
        (images,) = leaves(image.detach()[:1].repeat(batch, 1, 1, 1))
        expected = value_and_grads(CASES[case], images, *rest)
        check_all_same(value_and_grads(compiled, images, *rest), expected)
    name = case.partition(" ")[0]
    assert nodes(graphs.forward[0]) == [name]
    assert nodes(graphs.backward[0]) == [name if name == "dropout" else f"{name}_backward"]
    assert len(graphs.forward) == len(graphs.backward) == 1


@pytest.mark.parametrize("case", WHOLE)
def test_inference_keeps_nothing(randn, triton, graphs, case):
    """No code is written where no backward can follow."""
    tensors = [tensor.detach() for tensor in cases.operands(randn)]
    compiled = graphs.compile(CASES[case])
    check_same(compiled(*tensors), CASES[case](*tensors))
    (node,) = (n for n in graphs.forward[0].graph.nodes if str(n.target).startswith("alexkern."))
    schema = node.target._schema.arguments
    flags = {argument.name: value for argument, value in zip(schema, node.args, strict=True)}
    assert flags.get("save_code", False) is False


MODULES = {
    "Conv2dBiasReLU": lambda: nn.Conv2dBiasReLU(6, 4, 3, padding="same"),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm.preset("paper", groups=2),
    "MaxPool2d": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "LRNMaxPool2d": lambda: nn.LRNMaxPool2d(5, kernel_size=3, stride=2),
    "Dropout": lambda: nn.Dropout(0.3, mode="paper"),
    "LinearBiasReLUDropout": lambda: nn.LinearBiasReLUDropout(6, 5, p=0.3),
}


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODULES)
def test_modules(randn, device, backend, graphs, name, training):
    torch.manual_seed(0)
    module = MODULES[name]().to(device).train(training)
    shape = (2, 7, 6) if name == "LinearBiasReLUDropout" else (2, 6, 7, 5)
    operands = (*leaves(randn(*shape)), *module.parameters())
    compiled = graphs.compile(module, dynamic=True)

    def results(function):
        torch.manual_seed(1)  # for the masks
        return value_and_grads(lambda image, *parameters: function(image), *operands)

    for actual, expected in zip(results(compiled), results(module), strict=True):
        if backend == "triton":
            check_same(actual, expected)
        else:
            torch.testing.assert_close(actual, expected)


def network(device: torch.device) -> models.AlexNet:
    torch.manual_seed(0)
    return models.alexnet("mini", 10).to(device)


def test_network(randn, device, triton, graphs):
    """The whole network, forward and backward, in one graph for all batch sizes."""
    model = network(device)
    compiled = graphs.compile(model, dynamic=True)
    seeds = torch.tensor([3, 4], device=device)
    compiled(randn(5, 3, 32, 32), seeds)  # of 2, it would be taken for the number of seeds
    images = randn(3, 3, 32, 32)

    def results(function):
        return value_and_grads(lambda *_: function(images, seeds), *model.parameters())

    check_all_same(results(compiled), results(model))
    assert len(graphs.forward) == 1
    expected = ["conv2d_bias_relu_lrn_max_pool2d"] * 2 + ["conv2d_bias_relu"] * 3
    expected += ["max_pool2d", *["linear_bias_relu_dropout"] * 2]
    assert nodes(graphs.forward[0]) == expected
    assert sorted(nodes(graphs.backward[0])) == sorted(f"{name}_backward" for name in expected)


@pytest.mark.slow
def test_network_by_inductor(randn, device, triton):
    """By the compiler that users get, which must not move the operands in memory."""
    torch.compiler.reset()
    model = network(device).to(memory_format=torch.channels_last)
    images, seeds = randn(3, 3, 32, 32, layout="channels_last"), torch.tensor([3, 4]).to(device)
    compiled = torch.compile(model, fullgraph=True)
    for function in (compiled, model):
        function(images, seeds).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(images, seeds).square().sum().backward()
    for parameter, twice in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(twice, 2 * parameter.grad)


def test_masks_are_fresh(randn, device, triton, graphs):
    """Each call of a compiled function drops other units, as torch's generator goes on."""
    compiled = graphs.compile(lambda image: ops.dropout(image))
    image = randn(4, 50)
    torch.manual_seed(0)
    first, second = compiled(image), compiled(image)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    check_same(compiled(image), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_cuda_graphs_draw_fresh_masks(randn):
    torch.compiler.reset()
    compiled = torch.compile(lambda image: ops.dropout(image), mode="reduce-overhead")
    image = randn(64, 50)
    masks = {tuple((compiled(image) == 0).flatten().tolist()) for _ in range(6)}
    assert len(masks) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_network_in_cuda_graphs(randn, device):
    torch.compiler.reset()
    model = network(device)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    images, seeds = randn(8, 3, 32, 32), torch.tensor([3, 4], device=device)
    for _ in range(4):
        compiled(images, seeds).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(images, seeds).square().sum().backward()
    for parameter, fourfold in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(fourfold, 4 * parameter.grad)


def test_another_backend_is_compiled_for(randn, device, graphs):
    """A backend chosen at the call is not the one that was chosen when compiling."""
    compiled = graphs.compile(lambda image: ops.local_response_norm(image, 5))
    image = randn(2, 8, 5, 5)
    for name in ("torch", "triton", "torch"):
        with use_backend(name):
            compiled(image)
    assert [nodes(graph) for graph in graphs.forward] == [[], ["local_response_norm"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(randn, device, backend, graphs, dtype):
    """As eager calls do: weights' ops cast, the others keep their input's dtype."""

    def layer(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        image = ops.local_response_norm(image, 5, 0.5)
        return ops.max_pool2d(ops.conv2d_bias_relu(image, weight, bias, 1, 1), 3, 2)

    operands = cases.operands(randn)
    compiled = graphs.compile(layer)
    with torch.autocast(device.type, dtype):
        actual, expected = (value_and_grads(call, *operands) for call in (compiled, layer))
    assert actual[0].dtype == dtype
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("strict", [False, True])
def test_export(randn, device, backend, strict):
    """Saved and loaded, for other batch sizes: the same logits."""
    # torch.export reads the older switch, which raises where the newer one says otherwise
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    model = network(device).eval()
    batch = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        model, (randn(4, 3, 32, 32),), dynamic_shapes=batch, strict=strict
    )
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    images = randn(7, 3, 32, 32, seed=1)
    assert torch.equal(loaded(images), model(images))
    found = {str(node.target).split(".")[0] for node in program.graph.nodes}
    assert ("alexkern" in found) == (backend == "triton")


def test_augment(device, triton, graphs):
    images = torch.randint(256, (2, 9, 8, 3), dtype=torch.uint8, device=device)
    corners, flips = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([True, False])
    given = images, corners.to(device), flips.to(device), torch.rand(6, 5, 3, device=device)
    check_same(graphs.compile(ops.augment)(*given), ops.augment(*given))
    assert nodes(graphs.forward[0]) == ["augment"]


def test_refusals_while_compiling(randn, triton, graphs):
    """What an op refuses, it refuses with its own words."""
    compiled = graphs.compile(lambda image: ops.local_response_norm(image, 0))
    with pytest.raises(Exception, match="size should be greater than zero"):
        compiled(randn(2, 8, 5, 5))
