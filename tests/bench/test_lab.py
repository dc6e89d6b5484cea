"""The laboratory: what is wrong is not timed, what fails says why, and all of it is kept."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import (
    bench_augment,
    bench_conv,
    bench_dropout,
    bench_linear,
    bench_lrn,
    bench_pool,
    machine,
)
from bench.lab import DeviceLostError, Lab, Variant
from bench.ladder import INFERENCE, TRAINING, Ladder
from bench.operation import Implementation, Operation, implementations
from bench.record import Key, Record, load
from bench.work import Work
from tests.records import record

CPU = torch.device("cpu")
GROUP = Key("ops", "op", "layer", "forward", "fp32", 2, "")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    made = record()
    made.ceilings.matmul_flops_per_second["fp32"] = 1e12
    return Lab(CPU, made, tmp_path / "record.json")


def variant(result: float, ratio: float, calls: list[str] | None = None) -> Variant:
    def call() -> float:
        if calls is not None:
            calls.append("called")
        return result

    return Variant(lambda: [call], lambda value: ratio if value == result else 99.0)


def test_right_variants_are_timed_and_kept(lab: Lab) -> None:
    lab.measure(GROUP, [Work(0, 43), Work(10**3, 0)], {"a": variant(1, 0.5), "b": variant(2, 1.0)})
    assert lab.path is not None
    kept = load(Record, lab.path).measurements
    assert [m.key.variant for m in kept] == ["a", "b"]
    for m in kept:
        assert len(m.seconds) == 3
        assert m.failure is None
        assert m.floor_seconds == pytest.approx(43 / 4.3e12 + 1e3 / 1e12)  # one after the other
        assert (m.flops, m.bytes) == (1000, 43)
    assert kept[0].error_ratio == 0.5


@pytest.mark.parametrize("ratio", [1.01, float("nan"), float("inf")])
def test_a_wrong_result_is_not_timed(lab: Lab, ratio: float) -> None:
    calls: list[str] = []
    lab.measure(GROUP, [Work(0, 1)], {"bad": variant(1, ratio, calls), "good": variant(2, 0.0)})
    bad, good = lab.record.measurements
    assert bad.seconds == []
    assert "wrong result" in str(bad.failure)
    assert len(calls) == 3  # to warm up, in the making of the program, for the check
    assert len(good.seconds) == 3


def test_a_variant_that_raises_does_not_stop_the_others(lab: Lab) -> None:
    def broken() -> list[Any]:
        raise RuntimeError("no such engine\nmore of it")

    variants = {"broken": Variant(broken, lambda _: 0.0), "good": variant(2, 0.0)}
    lab.measure(GROUP, [Work(0, 1)], variants)
    broken_, good = lab.record.measurements
    assert broken_.failure == "RuntimeError: no such engine"
    assert good.seconds


def test_checking_alone_takes_no_time(lab: Lab) -> None:
    checking = Lab(CPU, lab.record, None, timed=False)
    checking.measure(GROUP, [Work(0, 1)], {"a": variant(1, 0.5)})
    (m,) = checking.measured.values()
    assert (m.seconds, m.failure, m.error_ratio) == ([], None, 0.5)


SUBJECTS = [
    bench_conv.subject("conv1", True),
    bench_conv.subject("conv2", True),
    bench_lrn.subject("1", True),
    bench_pool.subject("1", True),
    bench_dropout.subject("6", True),
    bench_linear.subject("6", True),
]


CASES = [
    *itertools.product(SUBJECTS, ["forward", "backward"]),
    (bench_augment.subject("fp32", True), "forward"),
    (bench_augment.subject("fp32", True, packed=True), "forward"),
]


@pytest.mark.parametrize(
    ("subject", "direction"), CASES, ids=lambda value: getattr(value, "layer", value)
)
def test_a_subject_is_right_and_a_broken_one_is_not(subject: Any, direction: str) -> None:
    made = Operation(subject, direction, 2, torch.float32, CPU, 0)

    def ratio(function: Any) -> float:
        way = dataclasses.replace(ways["alexkern"], function=function)
        broken = made.variant(way)
        return broken.error_ratio(broken.build()[0]())

    ways = implementations(subject.ours, subject.theirs, trial=True)
    assert ratio(subject.ours) <= 1
    assert ratio(lambda *tensors: subject.ours(*tensors) * (1 + 1e-3)) > 1
    assert not ratio(lambda *tensors: subject.ours(*tensors) * float("nan")) <= 1


def test_one_wrong_pixel_is_seen() -> None:
    """A largest error beside the RMS: one element of thousands is off by a hundredth."""
    subject = bench_pool.subject("1", True)
    made = Operation(subject, "forward", 2, torch.float32, CPU, 0)
    right = made.variant(implementations(subject.ours, subject.theirs, True)["eager_nchw"])
    output = right.build()[0]().detach().clone()
    assert made.error_ratio(output) <= 1
    output[0, 0, 0, 0] += 0.01
    assert made.error_ratio(output) > 1


def test_each_set_has_operands_of_its_own() -> None:
    subject = bench_pool.subject("1", True)
    bytes_per_call = subject.work("forward", 2, 4).bytes
    made = Operation(subject, "forward", 2, torch.float32, CPU, bytes_per_call // 2)
    way = implementations(subject.ours, subject.theirs, True)["eager_channels_last"]
    calls = made.variant(way).build()
    assert len(calls) == 2
    first, second = (call() for call in calls)
    assert not torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_those_of_the_operands_that_learn() -> None:
    for layer, count in (("conv1", 2), ("conv2", 3)):
        made = Operation(bench_conv.subject(layer, True), "backward", 2, torch.float32, CPU, 0)
        subject = bench_conv.subject(layer, True)
        way = implementations(subject.ours, subject.theirs, True)["eager_nchw"]
        assert len(made.variant(way).build()[0]()) == count


@pytest.mark.parametrize("training", [True, False])
def test_ladder_notices_a_network_that_is_not_the_same(
    lab: Lab, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ladder = Ladder("paper", training, 2, lab)
    rungs = ladder.variants()
    assert list(rungs) == list(TRAINING if training else INFERENCE)

    def ratio() -> float:
        calls = rungs["alexkern"].build()
        return rungs["alexkern"].error_ratio(calls[0]())

    assert ratio() <= 1
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b: real(x, w, b) * 1.1)
    rungs = ladder.variants()
    assert ratio() > 1


def test_what_a_training_step_leaves_is_looked_at(lab: Lab) -> None:
    rung = Ladder("paper", True, 2, lab).variants()["eager"]
    (step,) = rung.build()
    assert rung.error_ratio(step()) <= 1
    step()
    assert rung.error_ratio(torch.tensor(float("nan"))) > 1
    loss = step()
    for parameter in step.__self__._network.parameters():
        parameter.grad.mul_(1e-3)
    assert rung.error_ratio(loss) > 1


def test_weights_stay_while_training_is_timed(lab: Lab) -> None:
    (step,) = Ladder("no_lrn", True, 2, lab).variants()["eager"].build()
    weights = [parameter.detach().clone() for parameter in step.__self__._network.parameters()]
    for _ in range(3):
        step()
    assert all(map(torch.equal, weights, step.__self__._network.parameters()))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("bench", [bench_dropout, bench_linear])
def test_dropout_must_keep_half(bench: Any, direction: str) -> None:
    subject = bench.subject("6", True)
    made = Operation(subject, direction, 128, torch.float32, CPU, 0)

    def ratio(p: float, scale: float) -> float:
        def dropping(*operands: Tensor) -> Tensor:
            values = subject.before_dropout(*operands)
            return values * (torch.rand_like(values) >= p) * scale

        variant = made.variant(Implementation(dropping, channels_last=False))
        return variant.error_ratio(variant.build()[0]())

    assert ratio(0.5, 2) <= 1
    assert ratio(0.55, 2) > 1
    assert ratio(0.5, 1.99) > 1
    assert ratio(0, 1) > 1


def test_precision_is_put_back() -> None:
    def allowed() -> tuple[bool, bool]:
        assert torch.get_float32_matmul_precision()  # raises if set by two names at odds
        switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        return tuple(switch.fp32_precision == "tf32" for switch in switches)

    before = allowed()
    for dtype, wanted in (("tf32", True), ("bf16", False)):
        with machine.precision(dtype):
            assert allowed() == (wanted, wanted)
            assert machine.tf32_allowed() == wanted
    assert allowed() == before


def test_lrn_s_check_sees_the_normalisation() -> None:
    """A constant in its place, and a backward without the neighbours, are wrong."""
    subject = bench_lrn.subject("1", True)
    way = implementations(subject.ours, subject.theirs, True)["eager_nchw"]
    constant = dataclasses.replace(way, function=lambda x: x * 2**-0.75)
    detached = dataclasses.replace(
        way, function=lambda x: x * (subject.theirs(x) / x.clamp_min(1e-3)).detach()
    )
    for direction, wrong in (("forward", [constant]), ("backward", [constant, detached])):
        made = Operation(subject, direction, 2, torch.float32, CPU, 0)
        assert made.error_ratio(made.variant(way).build()[0]()) <= 1
        for broken in wrong:
            ratio = made.error_ratio(made.variant(broken).build()[0]())
            assert ratio > 1000  # in float32; in bfloat16 some 2**16 times less is allowed for


def test_an_error_that_spoils_the_device_ends_the_group_unrecorded(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Any]:
        raise RuntimeError("an illegal memory access was encountered")

    def lost(error: Exception) -> None:
        raise DeviceLostError(str(error))

    monkeypatch.setattr(lab, "_check_device", lost)
    with pytest.raises(DeviceLostError, match="illegal"):
        lab.measure(GROUP, [Work(0, 1)], {"a": Variant(broken, lambda _: 0.0)})
    assert not lab.record.measurements
