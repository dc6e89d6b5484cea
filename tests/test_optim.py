import copy
import io
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from alexkern import optim
from alexkern.models import alexnet
from alexkern.optim import KrizhevskySGD, weights_and_biases
from alexkern.runtime import config
from alexkern.runtime.launch import Launch, launch, record_launches
from tests.numerics import DTYPES, UNIT, check

HALF = [torch.float16, torch.bfloat16]
# one element, less than a vector, vectors and a rest, many programs, and layers
SHAPES = [(1,), (3,), (8,), (1003,), (2, 3, 5, 5), (4, 6, 3, 3), (33, 130), (0, 5)]
RATES = [0.1, 0.1, 0.01, 0.01]


def hand_loop(
    weight: Tensor, gradients: list[Tensor], rates: list[float], momentum: float, decay: float
) -> Tensor:
    """The rule as printed in section 5, one number at a time."""
    values = weight.double().clone().flatten().tolist()
    velocity = [0.0] * len(values)
    for gradient, lr in zip(gradients, rates, strict=True):
        for i, g in enumerate(gradient.double().flatten().tolist()):
            velocity[i] = momentum * velocity[i] - decay * lr * values[i] - lr * g
            values[i] += velocity[i]
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


def run(optimizer: torch.optim.Optimizer, gradients: list[Tensor], rates: list[float]) -> None:
    group = optimizer.param_groups[0]
    for gradient, lr in zip(gradients, rates, strict=True):
        group["lr"] = lr
        group["params"][0].grad = gradient.clone()
        optimizer.step()


def problem(steps: int) -> tuple[torch.nn.Parameter, list[Tensor]]:
    random = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(3, 2, generator=random, dtype=torch.float64))
    gradients = [torch.randn(3, 2, generator=random, dtype=torch.float64) for _ in range(steps)]
    return weight, gradients


def test_follows_the_printed_rule_over_a_drop_of_the_learning_rate():
    weight, gradients = problem(8)
    rates = [0.1] * 5 + [0.01] * 3
    expected = hand_loop(weight.detach(), gradients, rates, 0.9, 5e-4)
    run(KrizhevskySGD([weight], lr=0.1), gradients, rates)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-14, atol=0)


def test_keeps_the_large_velocity_after_a_drop():
    # Constant gradient 1, no decay, three steps at 0.1, then 0.01: v = -0.271, then
    # -0.2539, -0.23851, -0.224659, where torch.optim.SGD takes -0.03439, -0.040951, -0.0468559.
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = KrizhevskySGD([weight], lr=0.1, weight_decay=0.0)
    positions = [0.0]
    for lr in [0.1] * 3 + [0.01] * 3:
        run(optimizer, [torch.ones(1, dtype=torch.float64)], [lr])
        positions.append(weight.item())
    steps = [after - before for before, after in itertools.pairwise(positions)]
    assert steps == pytest.approx([-0.1, -0.19, -0.271, -0.2539, -0.23851, -0.224659], rel=1e-12)


def test_equals_sgd_at_a_constant_rate_and_only_there():
    def final(kind: type, rates: list[float]) -> Tensor:
        weight, gradients = problem(6)
        run(kind([weight], lr=rates[0], momentum=0.9, weight_decay=0.01), gradients, rates)
        return weight.detach()

    constant, falling = [0.05] * 6, [0.05] * 3 + [0.005] * 3
    torch.testing.assert_close(
        final(KrizhevskySGD, constant), final(torch.optim.SGD, constant), rtol=1e-12, atol=1e-14
    )
    difference = final(KrizhevskySGD, falling) - final(torch.optim.SGD, falling)
    assert difference.abs().max() > 1e-3


def test_several_groups_and_parameters_without_gradient():
    first, second, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = KrizhevskySGD(
        [{"params": [first, unused]}, {"params": [second], "lr": 0.5, "weight_decay": 0.0}], lr=0.1
    )
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(first.detach(), torch.full((2,), 1 - 5e-4 * 0.1 - 0.1))
    torch.testing.assert_close(second.detach(), torch.full((2,), 0.5))
    assert torch.equal(unused.detach(), torch.ones(2))
    assert unused not in optimizer.state


def test_state_dict_continues_bit_exactly():
    weight, gradients = problem(6)
    rates = [0.1] * 6
    through = KrizhevskySGD([weight], lr=0.1)
    run(through, gradients[:3], rates[:3])
    twin = torch.nn.Parameter(weight.detach().clone())
    resumed = KrizhevskySGD([twin], lr=7.0, momentum=0.0)
    resumed.load_state_dict(copy.deepcopy(through.state_dict()))
    run(through, gradients[3:], rates[3:])
    run(resumed, gradients[3:], rates[3:])
    assert torch.equal(weight, twin)


def test_closure_is_evaluated_with_gradients_and_its_loss_returned():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = KrizhevskySGD([weight], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * 3).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert weight.item() == pytest.approx(2.0 - 0.3)


def test_scheduler_sets_the_rate():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = KrizhevskySGD([weight], lr=1.0, momentum=0.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)
    seen = []
    for _ in range(3):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        seen.append(before - weight.item())
    assert seen == pytest.approx([1.0, 1.0, 0.1])


def test_gradient_scaler_unscales_and_skips_overflow():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = KrizhevskySGD([weight], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor, expected in ((2.0, 0.8), (float("inf"), 0.8)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lr", "Invalid learning rate: -1"),
        ("momentum", "Invalid momentum value: -1"),
        ("weight_decay", "Invalid weight_decay value: -1"),
    ],
)
def test_refuses_negative_arguments(name, message):
    with pytest.raises(ValueError, match=message):
        KrizhevskySGD([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, name: -1})


def test_refuses_sparse_gradients():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        KrizhevskySGD(embedding.parameters(), lr=0.1).step()


class Problem(NamedTuple):
    """Parameters, and their gradients for each step."""

    parameters: list[nn.Parameter]
    gradients: list[list[Tensor]]

    def run(self, optimizer: torch.optim.Optimizer, rates: list[float], first: int = 0) -> None:
        for step, lr in enumerate(rates, first):
            for group in optimizer.param_groups:
                group["lr"] = lr
            for parameter, gradient in zip(self.parameters, self.gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    def again(self) -> "Problem":
        return Problem([nn.Parameter(p.detach().clone()) for p in self.parameters], self.gradients)


@pytest.fixture
def layers(randn):
    """Makes a problem of all SHAPES, images in channels_last, over the steps of RATES."""

    def make(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> Problem:
        def tensors(seed: int) -> list[Tensor]:
            layouts = ["channels_last" if len(shape) == 4 else "nchw" for shape in shapes]
            return [
                randn(*shape, dtype=dtype, layout=layout, seed=seed)
                for shape, layout in zip(shapes, layouts, strict=True)
            ]

        steps = range(1, len(RATES) + 1)
        return Problem([nn.Parameter(t) for t in tensors(0)], [tensors(step) for step in steps])

    return make


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    made: list[Launch] = []

    def record(kernel, grid, *arguments, **keywords):
        made.append(Launch(kernel, grid, arguments, keywords, {}))
        launch(kernel, grid, *arguments, **keywords)

    monkeypatch.setattr(optim, "launch", record)
    return made


def state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that a step changes, parameters first."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [tensor for p in parameters for _, tensor in sorted(optimizer.state[p].items())]
    return [p.detach() for p in parameters] + held


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def check_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def check_rule(
    problem: Problem, optimizer: KrizhevskySGD, start: Problem, decay: float = 5e-4
) -> None:
    """Weights and velocities after the steps of RATES against the printed rule in float64.

    A term of the sums that they are is rounded at most 8 times in a step: three numbers of the
    rule to float32, and five operations. So after n steps the error is at most 8 * n * u times the
    sum of the terms' absolute values, which the same rule gives with all signs positive.
    """
    for index, parameter in enumerate(problem.parameters):
        if not parameter.numel():
            continue
        w = start.parameters[index].detach().double()
        v, w_terms = torch.zeros_like(w), w.abs()
        v_terms = torch.zeros_like(w)
        for lr, gradients in zip(RATES, problem.gradients, strict=True):
            g = gradients[index].double()
            v = 0.9 * v - decay * lr * w - lr * g
            w = w + v
            v_terms = 0.9 * v_terms + decay * lr * w_terms + lr * g.abs()
            w_terms = w_terms + v_terms
        none, units = torch.zeros_like(w), 8 * len(RATES) * UNIT
        held = optimizer.state[parameter]
        check("velocity", held["velocity"], v, none, units * v_terms)
        check("weight", held.get("master", parameter), w, none, units * w_terms)
        check("parameter", parameter, w, none, units * w_terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_follow_the_printed_rule(backend, layers, dtype):
    problem = layers(dtype)
    start, optimizer = problem.again(), KrizhevskySGD(problem.parameters, lr=1.0)
    problem.run(optimizer, RATES)
    check_rule(problem, optimizer, start)


def test_gradients_in_half_precision_of_float32_parameters(backend, layers):
    problem = layers()
    halves = [[gradient.bfloat16() for gradient in step] for step in problem.gradients]
    problem = Problem(problem.parameters, halves)
    for parameter in problem.parameters:
        parameter.grad_dtype = torch.bfloat16
    start, optimizer = problem.again(), KrizhevskySGD(problem.parameters, lr=1.0)
    problem.run(optimizer, RATES)
    check_rule(problem, optimizer, start)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_parameters_are_rounded_masters(backend, layers, dtype):
    problem = layers(dtype)
    optimizer = KrizhevskySGD(problem.parameters, lr=1.0)
    problem.run(optimizer, RATES)
    for parameter in problem.parameters:
        if parameter.numel():
            master = optimizer.state[parameter]["master"]
            assert master.dtype == optimizer.state[parameter]["velocity"].dtype == torch.float32
            assert not torch.equal(master, parameter.float())
            if dtype == torch.bfloat16 and backend == "triton" and not parameter.is_cuda:
                # Triton's interpreter cuts where hardware rounds.
                master = (master.view(torch.int32) & ~0xFFFF).view(torch.float32)
            assert torch.equal(parameter, master.to(dtype))


def test_small_steps_are_not_lost_in_half_precision(backend, device):
    """1 - 0.0001 is 1 in bfloat16; a hundred of these steps are not."""
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16, device=device))
    optimizer = KrizhevskySGD([weight], lr=1e-4, momentum=0.0, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.state[weight]["master"][0].item() == pytest.approx(0.99, rel=1e-5)
    assert weight[0].item() < 1


def test_a_master_weight_does_not_outlive_half_precision(backend, device):
    """What float32 learned in between is not undone."""
    model = nn.Linear(4, 1, device=device).bfloat16()
    optimizer = KrizhevskySGD(model.parameters(), lr=0.125, momentum=0.0, weight_decay=0.0)

    def step(gradient: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()

    step(1.0)
    model.float()
    step(4.0)
    expected = model.weight.detach().bfloat16()
    model.bfloat16()
    step(0.0)
    assert torch.equal(model.weight.detach(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_no_block_group_or_address(triton, layers, dtype):
    def final(groups: Any = lambda parameters: parameters, offset: int = 0) -> list[Tensor]:
        problem = layers(dtype)
        for parameter in problem.parameters:
            buffer = parameter.new_empty(parameter.numel() + offset)
            place = buffer.as_strided(parameter.shape, parameter.stride(), offset)
            parameter.data = place.copy_(parameter.detach())
        optimizer = KrizhevskySGD(groups(problem.parameters), lr=1.0)
        problem.run(optimizer, RATES)
        return [p.detach() for p in problem.parameters] + [
            optimizer.state[p]["velocity"] for p in problem.parameters if p.numel()
        ]

    expected = final()
    check_bits(final(), expected)
    check_bits(final(lambda parameters: [{"params": [p]} for p in parameters]), expected)
    for offset in (1, 2, 4):
        check_bits(final(offset=offset), expected)
    with config.shipped_configurations():
        check_bits(final(), expected)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_beside_the_tensors(triton, layers, dtype, offset):
    problem = layers(dtype)
    buffers, optimizer = [], KrizhevskySGD(problem.parameters, lr=0.1)

    def guarded(tensor: Tensor) -> Tensor:
        buffer = tensor.new_full((tensor.numel() + 8192 + offset,), 77.0)
        buffers.append((buffer, tensor.numel()))
        place = buffer.as_strided(tensor.shape, tensor.stride(), 4096 + offset)
        return place.copy_(tensor.detach())

    problem.run(optimizer, RATES[:1])
    for parameter in problem.parameters:
        parameter.data = guarded(parameter)
        for name, value in optimizer.state[parameter].items():
            optimizer.state[parameter][name] = guarded(value)
        parameter.grad = guarded(parameter.grad)
    before = copies(state(optimizer))
    optimizer.step()
    assert not any(
        torch.equal(new, old) for new, old in zip(state(optimizer), before, strict=True) if len(new)
    )
    for buffer, count in buffers:
        assert (buffer[: 4096 + offset] == 77).all()
        assert (buffer[4096 + offset + count :] == 77).all()
    assert all(
        (parameter.grad == problem.gradients[0][i]).all()
        for i, parameter in enumerate(problem.parameters)
    )


def test_one_launch_for_all_layers(triton, launches, layers):
    problem = layers(shapes=[(96, 3, 11, 11), (96,), (1000, 64), (1000,), (8,)] * 20)
    optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(optimizer, RATES[:2])
    assert len(launches) == 2


def test_odd_sizes_and_addresses_take_a_second_launch(triton, launches, layers):
    problem = layers(shapes=[(1003,), (64,)])
    problem.parameters[1].data = torch.empty(65, device=problem.parameters[1].device)[1:].zero_()
    problem.run(KrizhevskySGD(problem.parameters, lr=0.1), RATES[:1])
    vectors, rest = launches
    assert (vectors.constants["VECTOR"], rest.constants["VECTOR"]) == (4, 1)
    assert [made.arguments[0][:, 3].tolist() for made in launches] == [[1000], [3, 64]]


def test_tables_are_made_again_only_for_new_addresses(triton, launches, layers):
    problem = layers(shapes=[(64,), (32, 8)])
    optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(optimizer, RATES[:1])
    kept = [p.grad for p in problem.parameters]
    optimizer.step()
    problem.run(optimizer, RATES[:1])
    problem.parameters[0].data = problem.parameters[0].data.clone()
    optimizer.step()
    first, second, third, fourth = (made.arguments[:2] for made in launches)
    same = [
        [a is b for a, b in zip(first, later, strict=True)] for later in (second, third, fourth)
    ]
    assert same == [[True, True], [True, False], [False, False]]
    assert first[1].tolist() == [gradient.data_ptr() for gradient in kept]


def test_rate_on_the_device(backend, layers, device):
    """The same bits as a number that float32 holds, also by a factor."""
    finals = []
    for lr in (0.125, torch.tensor(0.125, device=device), torch.tensor([0.125], device=device)):
        problem = layers()
        optimizer = KrizhevskySGD(problem.parameters, lr=lr, lr_factor=2.0)
        for step in range(2):
            for parameter, gradient in zip(
                problem.parameters, problem.gradients[step], strict=True
            ):
                parameter.grad = gradient.clone()
            optimizer.step()
            lr = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = lr / 2 if isinstance(lr, float) else lr.div_(2)
        finals.append(state(optimizer))
    check_bits(finals[1], finals[0])
    check_bits(finals[2], finals[0])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("flag", [1.0, 2.0, math.nan])
def test_a_flag_on_the_device_gates_the_step(backend, layers, device, dtype, flag):
    problem = layers(dtype)
    optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(optimizer, RATES[:1])
    before = copies(state(optimizer))
    optimizer.found_inf = torch.tensor(flag, device=device)
    for parameter in problem.parameters:
        parameter.grad.fill_(math.nan)
    optimizer.step()
    check_bits(state(optimizer), before)

    twin = problem.again()
    other = KrizhevskySGD(twin.parameters, lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.found_inf.zero_()
    problem.run(optimizer, RATES[1:2], first=1)
    twin.run(other, RATES[1:2], first=1)
    check_bits(state(optimizer), state(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_scaler_without_a_wait(backend, layers, device, dtype, monkeypatch):
    """Scaled gradients give what plain ones do, an infinity nothing; the host learns neither."""
    problem = layers(dtype)
    twin = problem.again()
    plain = KrizhevskySGD(twin.parameters, lr=1.0)
    twin.run(plain, RATES[:1])
    optimizer = KrizhevskySGD(problem.parameters, lr=RATES[0])
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    scaler.scale(torch.ones((), device=device))
    for parameter, gradient in zip(problem.parameters, problem.gradients[0], strict=True):
        parameter.grad = gradient * 8
    monkeypatch.setattr(scaler, "_maybe_opt_step", None)  # which asks for the flag
    scaler.step(optimizer)
    scaler.update()
    check_bits(state(optimizer), state(plain))
    assert torch.equal(problem.parameters[3].grad, problem.gradients[0][3] * 8)

    problem.parameters[3].grad[5] = math.inf
    scaler.step(optimizer)
    scaler.update()
    check_bits(state(optimizer), state(plain))
    assert scaler.get_scale() == 4.0
    assert not hasattr(optimizer, "found_inf")


def test_unscaled_and_clipped_gradients(backend, layers, device):
    finals = []
    for scale in (1.0, 1024.0):
        problem = layers()
        optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        scaler.scale(torch.ones((), device=device))
        for parameter, gradient in zip(problem.parameters, problem.gradients[0], strict=True):
            parameter.grad = gradient * scale
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(problem.parameters, 1.0)
        assert norm > 50
        scaler.step(optimizer)
        finals.append(state(optimizer))
    check_bits(finals[1], finals[0])
    start = layers().parameters
    moved = torch.cat(
        [(p - q).flatten() for p, q in zip(finals[0][: len(start)], start, strict=True)]
    )
    assert moved.norm().item() == pytest.approx(0.1, rel=0.01)


def test_schedulers_set_a_rate_on_the_device(backend, device):
    model = nn.Linear(3, 2, device=device)
    rate = torch.tensor(1.0, device=device)
    optimizer = KrizhevskySGD(weights_and_biases(model), rate, momentum=0.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.125)
    seen = []
    for _ in range(3):
        before = copies([model.weight.detach(), model.bias.detach()])
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        seen += [(b - p).mean().item() for b, p in zip(before, model.parameters(), strict=True)]
    assert seen == pytest.approx([1, 2, 1, 2, 0.125, 0.25], rel=1e-5)


def test_biases_learn_twice_as_fast_and_do_not_decay():
    model = alexnet("mini", 10)
    weights, biases = weights_and_biases(model)
    assert [p.dim() for p in biases["params"]] == [1] * 8
    assert all(p.dim() > 1 for p in weights["params"])
    optimizer = KrizhevskySGD([weights, biases], lr=0.1, momentum=0.0, weight_decay=0.01)
    before = [p.detach().clone() for p in (model.conv1.weight, model.conv1.bias)]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = before[0] - 0.1 * (1 + 0.01 * before[0]), before[1] - 0.2
    torch.testing.assert_close(model.conv1.weight.detach(), expected[0])
    torch.testing.assert_close(model.conv1.bias.detach(), expected[1])


def test_the_name_tells_a_bias():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False))
    weights, biases = weights_and_biases(model, lr_factor=3.0, weight_decay=0.1)
    assert list(map(id, biases["params"])) == [id(model[0].bias), id(model[1].bias)]
    assert len(weights["params"]) == 3
    assert (biases["lr_factor"], biases["weight_decay"]) == (3.0, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_state_continues_bit_exactly(backend, layers, device, dtype):
    problem = layers(dtype)
    through = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(through, RATES[:2])
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, map_location=device, weights_only=True)
    twin = problem.again()
    resumed = KrizhevskySGD(twin.parameters, lr=7.0, momentum=0.0)
    resumed.load_state_dict(saved)
    for held in resumed.state.values():
        assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    problem.run(through, RATES[2:], first=2)
    twin.run(resumed, RATES[2:], first=2)
    check_bits(state(resumed), state(through))


def test_a_hook_changes_what_is_loaded(layers):
    problem = layers(torch.bfloat16)
    optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(optimizer, RATES[:1])
    saved = optimizer.state_dict()

    def without_state(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "state": {}}

    resumed = KrizhevskySGD(problem.parameters, lr=0.1)
    resumed.register_load_state_dict_pre_hook(without_state)
    resumed.load_state_dict(saved)
    assert not resumed.state


def test_checkpoints_of_before_master_weights_load(backend, layers):
    problem = layers(torch.bfloat16)
    optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(optimizer, RATES[:1])
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["lr_factor"]
    for held in old["state"].values():
        del held["master"]
        held["velocity"] = held["velocity"].bfloat16()
    optimizer.load_state_dict(old)
    problem.run(optimizer, RATES[1:2], first=1)
    held = optimizer.state[problem.parameters[3]]
    assert held["velocity"].dtype == held["master"].dtype == torch.float32
    assert optimizer.param_groups[0]["lr_factor"] == 1.0


def test_a_half_precision_state_continues_in_float32(backend, layers):
    """Its master weights are nothing to a model that has all digits itself."""
    problem = layers(torch.bfloat16)
    optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(optimizer, RATES[:1])
    wide = Problem([nn.Parameter(p.detach().float()) for p in problem.parameters], [])
    resumed = KrizhevskySGD(wide.parameters, lr=1.0, weight_decay=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    velocity = resumed.state[wide.parameters[3]]["velocity"].clone()
    before = wide.parameters[3].detach().clone()
    for parameter in wide.parameters:
        parameter.grad = torch.zeros_like(parameter)
    resumed.param_groups[0]["weight_decay"] = 0.0
    resumed.step()
    torch.testing.assert_close(wide.parameters[3].detach(), before + 0.9 * velocity)


def test_a_copied_optimizer_works(backend, layers):
    problem = layers()
    optimizer = KrizhevskySGD(problem.parameters, lr=0.1)
    problem.run(optimizer, RATES[:1])
    twin = copy.deepcopy(optimizer)
    problem.run(optimizer, RATES[1:2], first=1)
    copied = Problem(twin.param_groups[0]["params"], problem.gradients)
    copied.run(twin, RATES[1:2], first=1)
    check_bits(state(twin), state(optimizer))


def test_state_follows_the_memory_order_of_its_parameter(backend, layers):
    """Of a model that changes its format, with a gradient in the other one."""
    problem = layers(shapes=[(4, 6, 3, 3)])
    expected = problem.again()
    optimizer, other = (KrizhevskySGD(p.parameters, lr=0.1) for p in (problem, expected))
    expected.run(other, RATES)
    problem.run(optimizer, RATES[:2])
    problem.parameters[0].data = problem.parameters[0].data.contiguous()
    problem.run(optimizer, RATES[2:], first=2)
    check_bits(state(optimizer), state(other))
    velocity = optimizer.state[problem.parameters[0]]["velocity"]
    assert velocity.is_contiguous() == (problem.parameters[0].is_contiguous())


def test_parameters_with_gaps_in_memory(backend, launches, randn):
    whole = randn(6, 10)
    problem = Problem([nn.Parameter(whole[:, ::2])], [[randn(6, 5, seed=s)] for s in range(4)])
    start = problem.again()
    gaps = whole[:, 1::2].clone()
    optimizer = KrizhevskySGD(problem.parameters, lr=1.0)
    problem.run(optimizer, RATES)
    check_rule(problem, optimizer, start)
    assert torch.equal(whole[:, 1::2], gaps)
    assert not launches


def test_tensor_subclasses(backend, launches, randn):
    class Special(Tensor):
        pass

    weight = randn(5, 3).as_subclass(Special).requires_grad_()
    problem = Problem([weight], [[randn(5, 3, seed=step)] for step in range(4)])
    start = problem.again()
    optimizer = KrizhevskySGD(problem.parameters, lr=1.0)
    problem.run(optimizer, RATES)
    check_rule(problem, optimizer, start)
    assert not launches


def test_a_compiled_function_may_make_a_step(backend, device):
    def made() -> tuple[nn.Module, KrizhevskySGD]:
        torch.manual_seed(0)
        model = nn.Linear(9, 4, device=device)
        return model, KrizhevskySGD(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: KrizhevskySGD) -> None:
        optimizer.zero_grad()
        model(torch.ones(5, 9, device=device)).square().mean().backward()
        optimizer.step()

    eager, compiled = made(), made()
    for _ in range(2):
        step(*eager)
        torch.compile(step, backend="eager")(*compiled)
    check_bits(state(compiled[1]), state(eager[1]))


def test_expanded_gradients(backend, device):
    weight = nn.Parameter(torch.ones(5, 7, device=device))
    optimizer = KrizhevskySGD([weight], lr=0.5, weight_decay=0.0)
    weight.grad = torch.ones(1, 1, device=device).expand(5, 7)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full_like(weight, 0.5))


def test_state_of_another_shape_is_refused(backend, device):
    weight = nn.Parameter(torch.ones(5, device=device))
    optimizer = KrizhevskySGD([weight], lr=0.5)
    optimizer.state[weight]["velocity"] = torch.zeros(3, device=device)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"shape \[5\], got \[3\]"):
        optimizer.step()


def test_nothing_to_do(backend, launches):
    empty, unused = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(3))
    empty.grad = torch.ones(0)
    optimizer = KrizhevskySGD([{"params": [empty, unused]}, {"params": []}], lr=0.1)
    optimizer.step()
    assert not launches
    assert torch.equal(unused.detach(), torch.ones(3))


def test_parameters_on_several_devices(triton, device):
    """A launch for each, whose numbers are moved there."""
    parameters = [nn.Parameter(torch.ones(8, device=place)) for place in (device, "meta")]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = KrizhevskySGD(parameters, lr=torch.tensor(0.1, device=device))
    optimizer.found_inf = torch.zeros((), device=device)
    with record_launches() as recorded:
        optimizer.step()
    assert [made.arguments[0].device.type for made in recorded] == [device.type, "meta"]
    for made in recorded:
        tensors = [argument for argument in made.arguments if isinstance(argument, Tensor)]
        assert len({tensor.device for tensor in tensors}) == 1


@pytest.mark.parametrize("lr", [torch.ones(2), torch.ones(0)], ids=["two", "none"])
def test_refuses_rates_of_other_sizes(lr):
    with pytest.raises(ValueError, match="Tensor lr must be 1-element, got shape"):
        KrizhevskySGD([nn.Parameter(torch.ones(1))], lr=lr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestCudaGraphs:
    @pytest.mark.parametrize("keep_gradients", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_replays_follow_rate_flag_and_gradients(self, device, dtype, keep_gradients):
        """A captured backward and step against the same made one by one."""

        def made() -> tuple[nn.Module, Tensor, KrizhevskySGD]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 5)).to(device, dtype)
            rate = torch.tensor(0.125, device=device)
            optimizer = KrizhevskySGD(weights_and_biases(model), lr=rate)
            optimizer.found_inf = torch.zeros((), device=device)
            return model, torch.randn(16, 33, device=device, dtype=dtype), optimizer

        def step(model: nn.Module, image: Tensor, optimizer: KrizhevskySGD) -> None:
            optimizer.zero_grad(set_to_none=not keep_gradients)
            model(image).square().mean().backward()
            optimizer.step()

        eager, captured = made(), made()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*captured)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(*captured)
        step(*eager)
        for rate, flag in ((0.125, 0.0), (0.0625, 0.0), (0.0625, 1.0), (0.5, 0.0)):
            for _, _, optimizer in (eager, captured):
                optimizer.param_groups[0]["lr"].fill_(rate)
                optimizer.found_inf.fill_(flag)
            graph.replay()
            step(*eager)
            check_bits(state(captured[2]), state(eager[2]))
        step(*captured)  # between replays, on gradients of its own
        step(*eager)
        graph.replay()
        step(*eager)
        check_bits(state(captured[2]), state(eager[2]))

    def test_the_first_step_is_not_captured(self, device):
        weight = nn.Parameter(torch.ones(8, device=device))
        weight.grad = torch.ones_like(weight)
        optimizer = KrizhevskySGD([weight], lr=0.1)
        with (
            pytest.raises(RuntimeError, match="before one is captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()
        assert not optimizer.state.get(weight)
