import math

import pytest
import torch
from small_runs import small_dataset, small_trainer

from alexkern.data import Augmentation, iterate, training_batches
from alexkern.optim import KrizhevskySGD, weights_and_biases
from alexkern.training.errors import DivergedError
from alexkern.training.step import Outcome, Sentinel


def batch_of(dataset, device):
    batches = training_batches(dataset.train, 0, 0, 8, Augmentation(32, 5, True))
    return next(iterate(batches)).to(device)


def parts(device, **given):
    """A trainer's step, its network and a batch."""
    dataset = small_dataset()
    trainer = small_trainer(dataset, str(device), **given)
    step = trainer._make_step(0)
    step.set_rates([0.01, 0.01])
    return step, trainer.model, batch_of(dataset, device)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_finite_step_changes_every_weight(device, amp):
    step, model, batch = parts(device, amp=amp)
    before = weights(model)
    outcome = step(batch, [1, 2])
    assert outcome.finite.tolist() == [True, True]
    assert not any(map(torch.equal, before, weights(model)))


def test_sums_are_loss_times_images_and_wrong_answers(device):
    step, _, batch = parts(device)
    outcome = step(batch, [1, 2])
    loss, wrong = outcome.sums.tolist()
    assert loss == pytest.approx(8 * outcome.loss.item())
    assert wrong in range(9)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_velocity(device, amp, value, where):
    step, model, batch = parts(device, amp=amp)
    step(batch, [1, 2])
    before = weights(model)
    velocities = [state["velocity"].clone() for state in step._optimizer.state.values()]
    if where == "loss":
        batch.shift[3] = value
    else:
        model.conv3.weight.register_hook(
            lambda gradient: gradient.index_fill(0, _zero(gradient), value)
        )
    outcome = step(batch, [1, 2])
    finite = outcome.finite.tolist()
    assert finite[0] == (where == "gradient")
    # in float16 gradients overflow at times: the scale falls, and the run goes on
    assert finite[1] == (amp == "fp16")
    assert all(map(torch.equal, before, weights(model)))
    after = [state["velocity"] for state in step._optimizer.state.values()]
    assert all(map(torch.equal, velocities, after))


def test_a_loss_that_alone_is_not_finite_changes_no_weight(device):
    """A class that has no probability has finite gradients."""
    step, model, batch = parts(device)
    with torch.no_grad():
        model.fc8.bias[batch.labels[0]] = -math.inf
    before = weights(model)
    assert step(batch, [1, 2]).finite.tolist() == [False, True]
    assert all(map(torch.equal, before, weights(model)))


def _zero(tensor):
    return torch.zeros(1, dtype=torch.int64, device=tensor.device)


def test_the_sentinel_learns_one_step_later():
    fine = Outcome(torch.tensor(1.0), torch.tensor([True, True]), torch.zeros(2))
    bad = Outcome(torch.tensor(math.nan), torch.tensor([False, False]), torch.zeros(2))
    sentinel = Sentinel()
    sentinel.check()
    sentinel.note(1, fine)
    sentinel.note(2, bad)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 2, .*lower --lr"):
        sentinel.note(3, fine)


def test_the_sentinel_names_gradients():
    sentinel = Sentinel()
    sentinel.note(7, Outcome(torch.tensor(1.0), torch.tensor([True, False]), torch.zeros(2)))
    with pytest.raises(DivergedError, match="a gradient is not finite at step 7"):
        sentinel.check()


def test_biases_have_their_rate_and_decay(device):
    """One step from rest: the update is -lr * (g + decay * w) for weights and for biases."""
    step, model, batch = parts(device, bias_weight_decay=0.25, weight_decay=0.5)
    with torch.no_grad():
        model.conv2.bias.fill_(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step.set_rates([0.01, 0.02])
    step(batch, [1, 2])
    for name, parameter in model.named_parameters():
        rate, decay = (0.02, 0.25) if name.endswith("bias") else (0.01, 0.5)
        expected = before[name] - rate * (parameter.grad + decay * before[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
class TestGraphs:
    @pytest.fixture(autouse=True)
    def _one_algorithm(self, monkeypatch):
        """For the captured and for the eager step."""
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    @pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
    @pytest.mark.parametrize("kernels", ["triton", "torch"])
    def test_a_replayed_step_is_the_eager_one(self, amp, kernels):
        """Rates, seeds, images and colours change from step to step."""
        device = torch.device("cuda")
        dataset = small_dataset()
        networks, losses = [], []
        for graph in (True, False):
            trainer = small_trainer(dataset, "cuda", amp=amp, cuda_graph=graph, kernels=kernels)
            step = trainer._make_step(0)
            batches = training_batches(dataset.train, 0, 0, 8, Augmentation(32, 5, True))
            losses.append([])
            for number in range(10):
                step.set_rates([0.01 / (1 + number), 0.02])
                batch = batches[number % len(batches)].to(device)
                losses[-1].append(step(batch, [number, number + 100]).loss.item())
            networks.append(weights(trainer.model))
        assert losses[0] == losses[1]
        assert all(map(torch.equal, *networks))

    def test_a_bad_step_is_gated_inside_the_graph(self):
        step, model, batch = parts(torch.device("cuda"))
        for number in range(6):
            step(batch, [number, number])
        before = weights(model)
        bad = batch._replace(shift=torch.full_like(batch.shift, math.nan))
        assert step(bad, [1, 2]).finite.tolist() == [False, False]
        assert all(map(torch.equal, before, weights(model)))
        assert step(batch, [1, 2]).finite.tolist() == [True, True]
        assert not any(map(torch.equal, before, weights(model)))


def test_optimizer_groups_are_weights_and_biases():
    model = small_trainer().model
    optimizer = KrizhevskySGD(weights_and_biases(model, 1.0, 0.0), 0.1)
    dimensions = [{p.dim() for p in group["params"]} for group in optimizer.param_groups]
    assert dimensions == [{2, 4}, {1}]
