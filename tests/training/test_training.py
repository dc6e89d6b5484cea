import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import (
    assert_same,
    newest,
    results,
    rows,
    small_dataset,
    small_trainer,
    train,
)

from alexkern.models import get_preset
from alexkern.training import loop
from alexkern.training.errors import DivergedError, UsageError
from alexkern.training.metrics import LayerChange, Meter, wrong_answers
from alexkern.training.utilisation import Utilisation, training_flops

COLUMNS = [
    *("step", "epoch", "train_loss", "train_top1_error"),
    *("val_loss", "val_top1_error", "val_top5_error"),
    *("learning_rate", "images_per_second", "data_wait_share"),
]


# The parts


def test_wrong_answers():
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.4, 0.3], [0.0, 1.0, 2.0]])
    labels = torch.tensor([1, 2, 1])
    assert [wrong_answers(logits, labels, k).item() for k in (1, 2, 3, 5)] == [2, 1, 0, 0]


def test_meter_weighs_batches_by_their_images():
    meter = Meter(torch.device("cpu"))
    meter.add(torch.tensor([3.0, 0.0]), 3)
    meter.add(torch.tensor([5.0, 1.0]), 1)
    measured = meter.read()
    assert (measured.train_loss, measured.train_top1_error, measured.images) == (2.0, 0.25, 4)
    assert meter.read().train_loss == 2.0
    meter.reset()
    meter.add(torch.tensor([7.0, 0.0]), 1)
    assert meter.read().train_loss == 7.0


def test_meter_continues_with_the_means_but_not_with_the_speed():
    one, other = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    one.add(torch.tensor([3.0, 1.0]), 3)
    other.load_state_dict(one.state_dict())
    for meter in (one, other):
        meter.add(torch.tensor([5.0, 1.0]), 1)
    assert other.read().train_loss == one.read().train_loss == 2.0
    assert (one.read().images, other.read().images) == (4, 1)


def test_what_a_meter_pauses_for_takes_no_time():
    meter = Meter(torch.device("cpu"))
    meter.add(torch.tensor([3.0, 1.0]), 3)
    with meter.paused():
        time.sleep(0.2)
    assert meter.read().seconds < 0.1


# The loop


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_network_is_evaluated_on_centres_less_the_mean_of_centres(amp):
    dataset, seen = small_dataset(), []
    trainer = small_trainer(dataset, amp=amp)
    trainer.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    trainer.evaluate()
    inputs = torch.cat(seen)
    images = dataset.val.images[np.arange(10)].astype(np.float64)
    centres = (images - dataset.mean)[:, 2:34, 2:34].transpose(0, 3, 1, 2) / 64
    assert inputs.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)
    eps = torch.finfo(inputs.dtype).eps
    np.testing.assert_allclose(inputs.double().numpy(), centres, rtol=eps, atol=1e-6)


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [("triton", (12, 17, 17)), ("torch", (3, 32, 32)), ("auto", (3, 32, 32))],
)
def test_the_kernels_are_given_packed_images(kernels, shape, tmp_path):
    """In training and in evaluation."""
    seen = []
    trainer = small_trainer(kernels=kernels)

    def stop(_, arguments):
        seen.append(tuple(arguments[0].shape[1:]))
        raise InterruptedError

    trainer.model.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        trainer.evaluate()
    with pytest.raises(InterruptedError):
        train(trainer, 1, tmp_path)
    assert seen == [shape, shape]


@pytest.mark.parametrize("stop", [5, 8], ids=["at an epoch's end", "in an epoch"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop):
    """The second part goes on where the first was told to end, which adds an evaluation."""
    train(small_trainer(), 12, tmp_path / "through")
    train(small_trainer(), stop, tmp_path / "parts")
    resumed = small_trainer()
    resumed.load_state_dict(newest(tmp_path / "parts"))
    assert resumed.step == stop
    train(resumed, 12, tmp_path / "parts")
    through, parts = newest(tmp_path / "through"), newest(tmp_path / "parts")
    through.pop("best"), parts.pop("best")
    assert_same(through, parts)
    ends = [row for row in results(tmp_path / "through") if row["step"] != "8"]
    assert ends == [row for row in results(tmp_path / "parts") if row["step"] != "8"]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_run_saved_after_every_step_goes_on_from_any(tmp_path, amp):
    """Colour noise, decaying biases and a plateau are part of the state as well."""
    given = {"amp": amp, "colour_noise": "stdev", "schedule": "plateau:1", "save_minutes": 0.0}
    train(small_trainer(**given), 13, tmp_path / "through")
    folder, step = tmp_path / "parts", 0
    for budget in (1, 3, 1, 2, 1, 4, 99):
        trainer = small_trainer(**given)
        if step:
            trainer.load_state_dict(newest(folder))
        assert trainer.step == step
        asked = iter(range(1000))
        train(trainer, 13, folder, stopping=lambda: next(asked) >= budget)  # noqa: B023
        step = trainer.step
    assert step == 13
    assert_same(newest(tmp_path / "through"), newest(folder))
    assert results(tmp_path / "through") == results(folder)


def test_a_stop_in_an_evaluation_is_made_up_for(tmp_path):
    """Asked before 5 steps and 2 batches of the evaluation: 6 times no."""
    train(small_trainer(), 10, tmp_path / "through")
    answers = iter([False] * 6 + [True])
    folder = tmp_path / "parts"
    stopped = train(small_trainer(), 10, folder, stopping=lambda: next(answers))
    assert stopped.step == 5
    assert [row["step"] for row in rows(folder)] == ["2", "4"]
    resumed = small_trainer()
    resumed.load_state_dict(newest(folder))
    train(resumed, 10, folder)
    assert_same(newest(tmp_path / "through"), newest(folder))
    assert results(tmp_path / "through") == results(folder)


def test_workers_change_no_bit(tmp_path):
    train(small_trainer(), 6, tmp_path / "alone")
    train(small_trainer(workers=2), 6, tmp_path / "helped")
    assert_same(newest(tmp_path / "alone"), newest(tmp_path / "helped"))


def test_rows_after_the_checkpoint_are_written_anew(tmp_path):
    train(small_trainer(), 5, tmp_path)
    saved = newest(tmp_path)
    train(small_trainer(), 8, tmp_path)
    with open(tmp_path / "metrics.csv", "a") as file:
        # what a power cut may leave, and a line that a crash cut short
        file.write("\n4,\x00\x00\n,\n9,1,0.5")
    resumed = small_trainer()
    resumed.load_state_dict(saved)
    train(resumed, 10, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "5", "6", "8", "10"]


def test_checkpoints_within_an_epoch_are_minutes_apart(tmp_path, monkeypatch):
    """On a clock that goes 30 seconds between two steps; and two files at the end."""
    saved, trainer = [], small_trainer(save_minutes=1.0)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 30 * trainer.step)
    monkeypatch.setattr(trainer, "_save", lambda *_, **__: saved.append(trainer.step))
    train(trainer, 4, tmp_path)
    assert saved == [2, 4, 4]


def test_a_run_that_goes_back_keeps_what_it_saves(tmp_path):
    """Though there are two checkpoints of later steps."""
    train(small_trainer(), 5, tmp_path)
    saved = newest(tmp_path)
    train(small_trainer(), 15, tmp_path)
    resumed = small_trainer()
    resumed.load_state_dict(saved)
    train(resumed, 7, tmp_path)
    assert newest(tmp_path)["step"] == 7


def test_metrics_have_their_columns_and_an_evaluation_at_each_end(tmp_path):
    trainer = train(small_trainer(lr=0.01), 8, tmp_path)
    written = rows(tmp_path)
    assert list(written[0]) == COLUMNS
    assert [(row["step"], row["epoch"]) for row in written] == [
        *(("2", "1"), ("4", "1"), ("5", "1")),
        *(("6", "2"), ("8", "2")),
    ]
    assert [bool(row["val_loss"]) for row in written] == [False, False, True, False, True]
    for row in written:
        assert 0 <= float(row["train_top1_error"]) <= 1
        assert 0 <= float(row["data_wait_share"]) <= 1
        assert float(row["images_per_second"]) > 0
    # 28 % of 15 steps is 4.2: the rate falls for the sixth step.
    assert [float(row["learning_rate"]) for row in written] == pytest.approx(
        [0.01] * 3 + [1e-3] * 2
    )
    evaluation = trainer.evaluate().evaluation
    assert float(written[-1]["val_loss"]) == pytest.approx(evaluation.loss, rel=1e-6)
    assert float(written[-1]["val_top5_error"]) == 0  # three classes


def test_it_learns(tmp_path):
    trainer = small_trainer(epochs=20, print_freq=100)
    before = trainer.evaluate().evaluation.loss
    train(trainer, 50, tmp_path)
    assert before > 0.8 * math.log(3)
    assert trainer.evaluate().evaluation.loss < 0.3 * math.log(3)


def test_the_best_network_is_kept(tmp_path, monkeypatch):
    errors = iter([0.5, 0.3, 0.4, 0.3])
    evaluate = loop.evaluate

    def fake(*arguments, **given):
        found = evaluate(*arguments, **given)
        better = loop.replace(found.evaluation, top1_error=next(errors))
        return found._replace(evaluation=better)

    monkeypatch.setattr(loop, "evaluate", fake)
    trainer = train(small_trainer(), 20, tmp_path)
    best = loop.checkpoint.load(tmp_path / "best.pt")
    assert (best["step"], best["best"]["top1_error"], best["best"]["step"]) == (10, 0.3, 10)
    assert newest(tmp_path)["best"] == best["best"]
    assert "top-1 error 30.00%" in trainer.summary()
    assert "after step 10" in trainer.summary()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_stays_near_full_precision(tmp_path, amp):
    full, mixed = small_trainer(lr=0.0), small_trainer(lr=0.0, amp=amp)
    train(full, 2, tmp_path / "full")
    train(mixed, 2, tmp_path / "mixed")
    losses = [float(rows(tmp_path / name)[-1]["train_loss"]) for name in ("full", "mixed")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


def test_the_scale_of_fp16_is_saved(tmp_path):
    trainer = small_trainer(amp="fp16")
    train(trainer, 6, tmp_path)
    assert trainer.model.fc8.weight.dtype == torch.float32
    state = newest(tmp_path)
    state["scaler"]["scale"] = 256.0
    resumed = small_trainer(amp="fp16")
    resumed.load_state_dict(state)
    assert resumed.state_dict()["scaler"]["scale"] == 256.0


def test_divergence_stops_the_run_and_spares_the_checkpoint(tmp_path):
    train(small_trainer(), 5, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    wild = small_trainer(lr=1e20)
    wild.load_state_dict(newest(tmp_path))
    with pytest.raises(DivergedError, match=r"not finite|the loss is (nan|inf)"):
        train(wild, 15, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_a_network_that_its_last_step_blew_up_is_not_saved(tmp_path):
    """Its loss and gradients were finite."""
    train(small_trainer(), 5, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    wild = small_trainer(lr=1e20)
    wild.load_state_dict(newest(tmp_path))
    with pytest.raises(DivergedError, match="the held-out loss is nan after step 6"):
        train(wild, 6, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def test_epochs_of_another_length_are_refused():
    """The same step would be in another epoch."""
    state = small_trainer().state_dict()
    other = small_trainer(batch_size=10)
    with pytest.raises(UsageError, match=r"has 5 steps, and now 4: leave --batch-size"):
        other.load_state_dict(state)
    other.load_state_dict(state, training=False)


def test_other_classes_are_refused():
    state = small_trainer().state_dict()
    with pytest.raises(UsageError, match=r"knows 3 classes \(class 0, .* colours has 4"):
        small_trainer(small_dataset(4)).load_state_dict(state)


# The recipe


def test_conv1_is_frozen_after_its_epochs(tmp_path):
    trainer = train(small_trainer(conv1_epochs=2), 10, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    train(trainer, 15, tmp_path)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter) == name.startswith("conv1"), name
    assert [change.update == 0 for change in trainer._layer_changes(trainer.whole_network())] == [
        True
    ] + [False] * 7


def test_colour_noise_ends_after_its_epochs():
    trainer = small_trainer(colour_noise="stdev", colour_noise_epochs=2)
    spread = [trainer._training_batches(epoch).shift.std() for epoch in range(3)]
    assert spread[0] > 1
    assert spread[1] > 1
    assert spread[2] == 0


@pytest.mark.parametrize(("noise", "divisor"), [("stdev", 1.1), ("fbresnet", 1), ("none", 1)])
def test_pixels_with_the_noise_of_2012_are_divided(tmp_path, noise, divisor):
    """By 1.1, the noise included, in training only (2012 code, convdata_jpeg.py)."""
    dataset, seen = small_dataset(), []
    trainer = small_trainer(dataset, colour_noise=noise)
    trainer.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    train(trainer, 1, tmp_path)
    batch = next(iter(trainer._training_batches(0)))
    pixels = batch.images.numpy().astype(np.float64) - dataset.mean[2:34, 2:34]
    flipped = batch.images.numpy()[:, :, ::-1].astype(np.float64) - dataset.mean[2:34, 2:34]
    pixels = np.where(batch.flips.numpy()[:, None, None, None], flipped, pixels)
    expected = (pixels + batch.shift.numpy()[:, None, None]) / (64 * divisor)
    np.testing.assert_allclose(seen[0].permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)
    centres = (dataset.val.images[:8].astype(np.float64) - dataset.mean)[:, 2:34, 2:34] / 64
    np.testing.assert_allclose(seen[1].permute(0, 2, 3, 1), centres, rtol=1e-5, atol=1e-6)


def test_crop_offsets_and_chunks_reach_the_batches():
    batches = small_trainer(crop_offsets=2, crop_chunk=4)._training_batches(0)
    assert batches.corners.max() == 1
    assert (batches.corners[:4] == batches.corners[0]).all()


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_where_that_shows_the_same(flip):
    trainer = small_trainer(replace(small_dataset(), flip=flip))
    assert trainer._training_batches(0).flips.any() == flip


def test_the_seed_decides_on_initial_weights_and_dropout(tmp_path, monkeypatch):
    one, same, other = (small_trainer(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.model.fc6.weight, same.model.fc6.weight)
    assert not torch.equal(one.model.fc6.weight, other.model.fc6.weight)
    seen = []
    for trainer in (one, other):
        trainer.model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
        train(trainer, 3, tmp_path / str(trainer))
    given = torch.cat([seeds for seeds in seen if seeds is not None])
    assert len(given.unique()) == len(given) == 2 * 3 * 2  # runs, steps, layers


def test_the_dropout_mode_is_the_options():
    assert small_trainer(dropout_mode="inverted").model.preset.dropout_mode == "inverted"


def test_biases_follow_their_own_schedule(tmp_path):
    trainer = small_trainer(schedule="fixed:1", bias_schedule="step:2", bias_lr_factor=2.0, lr=0.5)
    rates = [trainer._rates(step) for step in range(0, 15, 5)]
    assert np.array(rates) == pytest.approx(np.array([[0.5, 1.0], [0.05, 1.0], [0.05, 0.1]]))


def test_the_paper_s_heuristic_ends_the_run(tmp_path):
    """With a rate of 0 nothing improves: four plateaus of one epoch, after the first."""
    trainer = train(small_trainer(lr=0.0, schedule="plateau:1", epochs=30), 150, tmp_path)
    assert trainer.step == 5 * 5
    assert trainer.total_steps == 150


def test_a_row_has_the_rate_of_its_last_step(tmp_path):
    """Also where the evaluation of the same step makes it fall: nothing is learnt at this rate."""
    train(small_trainer(lr=1e-12, schedule="plateau:1"), 15, tmp_path)
    ends = [row for row in rows(tmp_path) if row["val_loss"]]
    assert [float(row["learning_rate"]) for row in ends] == pytest.approx([1e-12, 1e-12, 1e-13])


def test_the_paper_s_heuristic_hears_of_whole_epochs(tmp_path):
    """The evaluation at the end of --steps, in an epoch, is none that it waits for."""
    trainer = train(small_trainer(lr=0.0, schedule="plateau:9"), 13, tmp_path)
    assert trainer.state_dict()["schedule"]["waited"] == 1


def test_options_of_today_win_over_the_checkpoint(tmp_path):
    train(small_trainer(weight_decay=0.1), 5, tmp_path)
    trainer = small_trainer(weight_decay=0.2, momentum=0.5)
    trainer.load_state_dict(newest(tmp_path))
    weights, biases = trainer._optimizer.param_groups
    assert (weights["weight_decay"], weights["momentum"]) == (0.2, 0.5)
    assert biases["weight_decay"] == 0.2


# What is shown


def test_layer_changes_are_mean_magnitudes(tmp_path, capsys):
    trainer = small_trainer()
    before = trainer.model.fc6.weight.detach().clone()
    train(trainer, 1, tmp_path)
    after = trainer.model.fc6.weight.detach()
    changes = {change.layer: change for change in trainer._layer_changes(trainer.whole_network())}
    assert list(changes) == [*(f"conv{n}" for n in range(1, 6)), "fc6", "fc7", "fc8"]
    assert changes["fc6"].weight == pytest.approx(after.abs().mean().item())
    assert changes["fc6"].update == pytest.approx((after - before).abs().mean().item(), rel=1e-3)
    assert f"  {changes['fc6']}\n" in capsys.readouterr().out
    assert str(LayerChange("fc6", 0.5, 0.001)).endswith("ratio 2.00e-03")


def test_a_stalled_start_is_explained_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "STALL_STEPS", 12)
    train(small_trainer(lr=0.0), 15, tmp_path / "stalled")
    # an initial loss above ln 3 that does not fall is that of a guess, too
    out = capsys.readouterr().out
    assert out.count("the loss is still that of a guess, ln 3 = 1.099") == 1
    for cause in ("0.03", "krizhevsky2012", "biases", "--lr 0"):
        assert cause in out
    train(small_trainer(epochs=20), 15, tmp_path / "learning")
    assert "guess" not in capsys.readouterr().out


def test_a_slow_loader_is_named(tmp_path):
    trainer = train(small_trainer(), 2, tmp_path)
    trainer._seconds["waiting for data"] = sum(trainer._seconds.values())
    assert "the data came too slowly" in trainer.summary()
    trainer._seconds["waiting for data"] = 0.0
    assert "too slowly" not in trainer.summary()


def test_tensorboard_gets_scalars_and_filters(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[test]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(small_trainer(), 10, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    written = rows(tmp_path)
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == [int(row["step"]) for row in written]
    assert [event.value for event in scalars] == pytest.approx(
        [float(row["train_loss"]) for row in written], rel=1e-6
    )
    ends = [float(row["val_top1_error"]) for row in written if row["val_loss"]]
    assert [event.value for event in events.Scalars("val/top1_error")] == pytest.approx(ends)
    fc8 = trainer.model.fc8.weight.abs().mean().item()
    assert events.Scalars("weight/fc8")[-1].value == pytest.approx(fc8)
    image = events.Images("conv1")[-1]
    assert (image.height, image.width) == (2 * 6 - 1, 16 * 6 - 1)  # 20 filters of 5x5


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[test]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small_trainer(), 5, tmp_path, tensorboard=True)
    saved = newest(tmp_path)
    train(small_trainer(), 9, tmp_path, tensorboard=True)
    resumed = small_trainer()
    resumed.load_state_dict(saved)
    train(resumed, 7, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 5, 6, 7]
    assert [int(row["step"]) for row in rows(tmp_path)] == [2, 4, 5, 6, 7]


def test_without_tensorboard_its_flag_names_the_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        train(small_trainer(), 1, tmp_path, tensorboard=True)


def test_training_flops_are_those_of_the_facts():
    """4.14 GFLOP per image: three times 724 million products, less conv1's input gradient."""
    forward, conv1 = 2 * 724_406_816, 2 * 105_415_200
    assert training_flops(get_preset("paper"), 1000) == 3 * forward - conv1


@pytest.mark.parametrize(("name", "amp"), [("", "bf16"), ("NVIDIA H100 80GB HBM3", "off")])
def test_no_utilisation_of_a_peak_that_is_not_known(monkeypatch, name, amp):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert Utilisation(get_preset("mini"), 10, amp, torch.device("cuda")).of(1e6) == ""


def test_utilisation_is_that_of_the_peak(monkeypatch):
    """4.14 GFLOP per image at 0.5 of 989 TFLOP/s."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    utilisation = Utilisation(get_preset("paper"), 1000, "bf16", torch.device("cuda"))
    assert utilisation.of(0.5 * 989e12 / 4.1356e9) == " (50.0% of the peak FLOP/s)"


@pytest.mark.slow
def test_compiled_run_agrees(tmp_path):
    plain = train(small_trainer(kernels="torch"), 3, tmp_path / "plain")
    compiled = train(small_trainer(kernels="compile"), 3, tmp_path / "compiled")
    for name, weight in plain.state_dict()["model"].items():
        torch.testing.assert_close(
            compiled.state_dict()["model"][name], weight, rtol=1e-4, atol=1e-5
        )
