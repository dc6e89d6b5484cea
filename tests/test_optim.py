import copy
import itertools

import pytest
import torch
from torch import Tensor

from alexkern.optim import KrizhevskySGD


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
