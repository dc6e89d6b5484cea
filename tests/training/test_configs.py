"""configs/: the runs of the paper, of the 2012 source and of others, as their sources have them."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest

from alexkern.training.options import Options, read_config, resolve
from alexkern.training.schedule import Plateau, Schedule, make_schedule

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))

# Rates of runs that fall exponentially, as the notes of run 170 write them out.
QUARTERS = {23: 0.01, 24: 0.0015874011, 47: 0.0015874011, 48: 0.00025198421, 72: 0.00004}

# Rates of biases: by hand they stay as they were; later dexp[base=0.02;tgtFactor=10;numSteps=2],
# of 95 epochs.
CONSTANT = {0: 0.02, 50: 0.02, 97: 0.02}
HALVES = {0: 0.02, 47: 0.02, 48: 0.002, 94: 0.002}

# 100,000 and 450,000 steps of 256 images.
CAFFE_EPOCHS = [round(steps * 256 / 1_281_167) for steps in (100_000, 450_000)]


class Source(NamedTuple):
    """What the source of a run says; errors as fractions, as logs have them."""

    errors: tuple[float, float]
    rates: dict[float, float]
    epochs: int = 90
    preset: str = "krizhevsky2012"
    batch: int = 128
    bias_rates: dict[float, float] = CONSTANT
    weight_decay: float = 0.0005
    bias_decay: float = 0.0
    noise_epochs: int | None = None
    conv1_epochs: int | None = None
    chunk: int = 32
    noise: str = "stdev"
    half_exchange: bool = False


def by_hand(*drops: int, rate: float = 0.01) -> dict[float, float]:
    """The rates around the epochs at which the author divided by 10."""
    rates = {0.0: rate}
    for drop in drops:
        rates |= {drop - 0.01: rate, drop: rate / 10}
        rate /= 10
    return rates


def others(errors: tuple[float, float], period: int, epochs: int = 90, **given) -> Source:
    """Runs by others: a tenth every ``period`` epochs, no colour noise, each image by itself."""
    rates = {0: 0.01, period - 1: 0.01, period: 1e-3, 2 * period: 1e-4}
    return Source(errors, rates, epochs, batch=256, chunk=1, noise="none", **given)


def caffes(preset: str, *accuracies: float) -> Source:
    """lr_mult: 2 of biases, under one schedule."""
    bias_rates = {0: 0.02, 20: 0.002, 89: 2e-6}
    errors = 1 - accuracies[0], 1 - accuracies[1]
    return others(errors, *CAFFE_EPOCHS, preset=preset, bias_rates=bias_rates)


SOURCES = {
    # Its rates are tested below.
    "paper": Source(
        (0.407, 0.182), {}, preset="paper", bias_rates={0: 0.01}, bias_decay=5e-4, chunk=1
    ),
    # Epochs from the logs in layers/layer-params-N.cfg: the drops, colour noise off, conv1 off,
    # the end.
    "krizhevsky2012-145": Source(
        (0.406640, 0.182100), by_hand(25, 51, 79), 91, noise_epochs=67, conv1_epochs=72
    ),
    "krizhevsky2012-145-2010": Source(
        (0.374727, 0.169987), by_hand(23, 51, 78), 93, noise_epochs=68, conv1_epochs=72
    ),
    "krizhevsky2012-145-half": Source(
        (0.391680, 0.182287), by_hand(20, 48), 96, "one_gpu_2012", noise_epochs=66, conv1_epochs=72
    ),
    "krizhevsky2012-147-no-overlap": Source(
        (0.410580, 0.185100), by_hand(23, 51, 79), 90, "no_overlap", conv1_epochs=79
    ),
    "krizhevsky2012-148-no-lrn": Source(
        (0.420340, 0.193620), by_hand(22, 44, 86), 97, "no_lrn", noise_epochs=69, conv1_epochs=73
    ),
    "krizhevsky2012-150-no-exchange": Source(
        (0.418280, 0.193300),
        by_hand(25, 49, 79),
        92,
        "no_exchange",
        noise_epochs=66,
        conv1_epochs=72,
    ),
    "krizhevsky2012-167-no-lrn2": Source(
        # dexp[1000,4]: from 0.01 to 0.00001 in four levels
        (0.404880, 0.181180),
        {0: 0.01, 23: 0.01, 24: 1e-3, 48: 1e-4, 71: 1e-4, 72: 1e-5, 94: 1e-5},
        95,
        "no_lrn2",
        bias_rates=HALVES,
        noise_epochs=63,
        conv1_epochs=73,
    ),
    "krizhevsky2012-170": Source(
        (0.405280, 0.180480), QUARTERS, 95, bias_rates=HALVES, noise_epochs=68, conv1_epochs=74
    ),
    "krizhevsky2012-170-256-double": Source(
        (0.422726, 0.196598),
        {epoch: 2 * rate for epoch, rate in QUARTERS.items()},
        95,
        batch=256,
        bias_rates={epoch: 2 * rate for epoch, rate in HALVES.items()},
        noise_epochs=61,
        conv1_epochs=73,
    ),
    "krizhevsky2012-170-quant": Source(
        (0.405240, 0.184160),
        QUARTERS,
        95,
        bias_rates=HALVES,
        noise_epochs=68,
        conv1_epochs=74,
        half_exchange=True,
    ),
    "krizhevsky2012-141-2009-half": Source(
        (0.674, 0.409), by_hand(6, 13, 25), 28, "conv6", noise_epochs=18, conv1_epochs=21
    ),
    "krizhevsky2012-146-2009": Source((0.391000, 0.168760), by_hand(2), 6, "conv6"),
    "krizhevsky2012-146-2012-2009": Source(
        (0.391000, 0.168760),
        by_hand(22, 42, rate=0.001),
        52,
        "conv6",
        noise_epochs=38,
        conv1_epochs=4,
    ),
    "krizhevsky2012-146-2012-2011": Source(
        (0.389900, 0.166220),
        by_hand(22, 42, rate=0.001),
        54,
        "conv6",
        noise_epochs=38,
        conv1_epochs=7,
    ),
    # --epochs 90 --mini 128 --color-noise 0.1; dexp[base=0.01;tgtFactor=250;numSteps=4], biases'
    # dexp[base=0.02;tgtFactor=10;numSteps=2]
    "cuda-convnet2-1gpu": Source(
        (0.404200, 0.181500),
        {22: 0.01, 23: 0.0015874011, 44: 0.0015874011, 45: 0.00025198421, 68: 0.00004},
        preset="cuda_convnet2",
        bias_rates={0: 0.02, 44: 0.02, 45: 0.002, 89: 0.002},
        chunk=1,
    ),
    "caffe-alexnet": caffes("caffe_alexnet", 0.571, 0.802),
    "caffenet": caffes("caffenet", 0.574, 0.804),
    "torchvision-alexnet": others(
        (1 - 0.56522, 1 - 0.79066),
        30,
        preset="owt",
        bias_rates={0: 0.01, 30: 1e-3, 89: 1e-4},
        weight_decay=1e-4,
        bias_decay=1e-4,
    ),
}


def options_of(file: Path) -> Options:
    return resolve({"data": "synthetic", **read_config(file)}, {})


def schedules(options: Options) -> tuple[Schedule, Schedule]:
    """Of weights and of biases."""
    schedule = make_schedule(options.schedule, options.epochs)
    if options.bias_schedule == "same":
        return schedule, schedule
    return schedule, make_schedule(options.bias_schedule, options.epochs)


def target_of(options: Options) -> tuple[str, ...]:
    found = re.search(r"top-1 ([\d.]+) %, top-5 ([\d.]+) %", options.target)
    assert found, options.target
    return found.groups()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_the_run_of_its_source(file: Path) -> None:
    options, source = options_of(file), SOURCES[file.stem]
    schedule, bias_schedule = schedules(options)
    rates = {epoch: options.lr * schedule.factor(epoch) for epoch in source.rates}
    assert rates == pytest.approx(source.rates, rel=1e-6)
    bias_lr = options.lr * options.bias_lr_factor
    bias_rates = {epoch: bias_lr * bias_schedule.factor(epoch) for epoch in source.bias_rates}
    assert bias_rates == pytest.approx(source.bias_rates)
    assert (options.preset, options.epochs) == (source.preset, source.epochs)
    assert options.batch_size == source.batch
    assert (options.momentum, options.weight_decay) == (0.9, source.weight_decay)
    assert options.bias_weight_decay == source.bias_decay
    assert (options.colour_noise, options.colour_noise_epochs) == (
        source.noise,
        source.noise_epochs,
    )
    assert options.conv1_epochs == source.conv1_epochs
    assert options.crop_chunk == source.chunk
    assert (options.half_exchange, options.amp) == (source.half_exchange, "off")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_target_is_the_number_of_the_source(file: Path) -> None:
    for percent, error in zip(target_of(options_of(file)), SOURCES[file.stem].errors, strict=True):
        assert float(percent) == pytest.approx(100 * error, abs=0.5 * 0.1 ** len(percent[3:]))


def test_every_source_has_a_file() -> None:
    assert {file.stem for file in FILES} == SOURCES.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_short_and_leaves_the_machine_out(file: Path) -> None:
    given = read_config(file)
    assert not given.keys() & {"data", "kernels", "workers", "deterministic", "cuda_graph", "seed"}
    defaults = asdict(resolve({"data": "synthetic", "preset": given.pop("preset")}, {}))
    assert not given.items() & defaults.items()
    assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_weights_of_other_classes_get_a_new_head(file: Path) -> None:
    options = options_of(file)
    assert bool(options.weights) == options.new_head == ("-146-2012-" in file.stem)


def test_the_papers_heuristic_divides_three_times() -> None:
    options = options_of(CONFIGS / "paper.toml")
    schedule = make_schedule(options.schedule, options.epochs)
    assert isinstance(schedule, Plateau)
    rates = []
    schedule.observe(0.5)
    while not schedule.finished:
        rates.append(options.lr * schedule.factor(0))
        for _ in range(5):
            schedule.observe(0.5)
    assert rates == pytest.approx([0.01, 0.001, 0.0001, 0.00001])
    # "a factor of 2048" (section 4.1): crops of 32 x 32 positions, mirrored or not
    assert options.crop_offsets is not None
    assert options.crop_offsets**2 * 2 == 2048


def test_the_readme_lists_every_file_and_its_target() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    row = r"^\| \[(.+)\.toml\]\(\1\.toml\) \| .+ \| ([\d.]+) / ([\d.]+) \| .+ \|$"
    listed = {name: errors for name, *errors in re.findall(row, text, re.MULTILINE)}
    assert listed == {file.stem: list(target_of(options_of(file))) for file in FILES}
