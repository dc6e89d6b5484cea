"""What a run is told to do: from the command line, a file, a checkpoint, or the preset."""

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from alexkern.training.errors import UsageError

KERNELS = ("auto", "triton", "torch", "compile")
SMALL_SETS = ("digits", "cifar10")
CHOICES = {
    "kernels": KERNELS,
    "amp": ("off", "bf16", "fp16"),
    "dropout_mode": ("paper", "inverted"),
    "colour_noise": ("none", "stdev", "fbresnet", "literal"),
}
_AT_LEAST_ONE = ("epochs", "batch_size", "crop_offsets", "crop_chunk", "print_freq")


@dataclass(frozen=True)
class Options:
    """What decides a run's numbers, and is therefore kept with it.

    Attributes:
        data: A built-in set's name or a folder.
        preset: The network.
        weights: File of weights to start from; empty for a fresh initialisation.
        new_head: fc8 is initialised all the same, for classes of one's own.
        kernels: ``auto``, ``triton``, ``torch``, or ``compile`` (torch under torch.compile).
        epochs: Length of the learning rate schedule, and of the run.
        batch_size: Images per step.
        lr: Initial learning rate.
        schedule: See :func:`alexkern.training.schedule.make_schedule`.
        momentum: Of the update rule.
        weight_decay: Of the update rule.
        bias_lr_factor: Times the learning rate, for biases.
        bias_schedule: ``same``, or a schedule of the biases' own.
        bias_weight_decay: As ``weight_decay``, for biases.
        dropout_mode: ``paper`` or ``inverted``, see :func:`alexkern.ops.dropout`.
        colour_noise: A reading, see :meth:`alexkern.data.Colours.noise`.
        colour_noise_epochs: Epochs with colour noise; None for all.
        conv1_epochs: Epochs in which conv1 learns; None for all.
        crop_offsets: Positions of a crop along each axis; None for all.
        crop_chunk: Images in a row that share one crop and reflection.
        amp: ``off``, ``bf16`` or ``fp16`` autocast.
        half_exchange: What crosses between columns is rounded to half precision, see
            :class:`alexkern.models.AlexNet`; in one process what would cross.
        deterministic: Only algorithms that give the same bits every time.
        cuda_graph: On a GPU the whole step is captured once, and replayed.
        workers: Processes that make batches; 0 for none.
        seed: Of initialisation, order, augmentation, dropout and synthetic images.
        print_freq: Steps between two rows of metrics.
        save_minutes: Between two checkpoints within an epoch.
        target: What this run should reach, and where that number is from.
    """

    data: str
    preset: str
    weights: str
    new_head: bool
    kernels: str
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    momentum: float
    weight_decay: float
    bias_lr_factor: float
    bias_schedule: str
    bias_weight_decay: float
    dropout_mode: str
    colour_noise: str
    colour_noise_epochs: int | None
    conv1_epochs: int | None
    crop_offsets: int | None
    crop_chunk: int
    amp: str
    half_exchange: bool
    deterministic: bool
    cuda_graph: bool
    workers: int
    seed: int
    print_freq: int
    save_minutes: float
    target: str

    def to_toml(self) -> str:
        """The text of a file for ``--config``."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        # JSON's strings, numbers and truth values are TOML's as well
        return "".join(
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in given.items()
        )


def read_config(path: Path) -> dict[str, Any]:
    """The options in a TOML file.

    Raises:
        UsageError: It cannot be read, or holds what is no option or not of its type.
    """
    try:
        with open(path, "rb") as file:
            given = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is no TOML: {error}") from error
    types = {field.name: field.type for field in fields(Options)}
    if unknown := sorted(given.keys() - types.keys()):
        raise UsageError(f"--config {path}: no option is called {', '.join(unknown)}")
    for name, value in given.items():
        wanted: Any = types[name]
        allowed = get_args(wanted) or (wanted,)
        if type(value) is int and float in allowed:
            given[name] = value = float(value)
        if type(value) not in allowed:
            kinds = " or ".join(kind.__name__ for kind in allowed if kind is not NoneType)
            raise UsageError(f"--config {path}: {name} must be {kinds}, got {value!r}")
    return given


def resolve(given: Mapping[str, Any], saved: Mapping[str, Any]) -> Options:
    """Complete the options, and check them.

    Args:
        given: Options of the command line and of a file. They win.
        saved: Options of the checkpoint that is resumed. They win over the defaults.

    Raises:
        UsageError: A value that cannot be, or another network than the checkpoint's.
    """
    from alexkern.models import get_preset

    for name in ("preset", "weights"):
        if name in saved and given.get(name, saved[name]) != saved[name]:
            raise UsageError(
                f"the checkpoint's run has {name} {saved[name]!r}, not {given[name]!r}: "
                f"leave --{name} out, or start a new run"
            )
    chosen = {**saved, **given}
    data = chosen.setdefault("data", "digits")
    chosen.setdefault("preset", "mini" if data in SMALL_SETS else "paper")
    try:
        preset = get_preset(chosen["preset"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    defaults = {
        "weights": "",
        "new_head": False,
        "kernels": os.environ.get("ALEXKERN_KERNELS", "auto"),
        "epochs": preset.epochs,
        "batch_size": preset.batch_size,
        "lr": preset.learning_rate,
        "schedule": "fixed",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "bias_lr_factor": 1.0,
        "bias_schedule": "same",
        "bias_weight_decay": chosen.get("weight_decay", 5e-4),
        "dropout_mode": preset.dropout_mode,
        "colour_noise": preset.colour_noise,
        "colour_noise_epochs": None,
        "conv1_epochs": None,
        "crop_offsets": None,
        "crop_chunk": 1,
        "amp": "off",
        "half_exchange": False,
        "deterministic": False,
        "cuda_graph": True,
        "workers": 0 if data in SMALL_SETS else _own_cores(),
        "seed": 0,
        "print_freq": 10,
        "save_minutes": 10.0,
        "target": "",
    }
    options = Options(**{**defaults, **chosen})
    _check(options, preset.stored_size - preset.crop_size + 1)
    return options


def _own_cores() -> int:
    """The machine's, divided among the processes that torchrun has started on it."""
    return max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _check(options: Options, offsets: int) -> None:
    from alexkern.training.schedule import Plateau, make_schedule

    for name, choices in CHOICES.items():
        if getattr(options, name) not in choices:
            raise UsageError(
                f"{name} must be one of {', '.join(choices)}, got {getattr(options, name)!r}"
            )
    for name, value in asdict(options).items():
        least = int(name in _AT_LEAST_ONE)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise UsageError(f"{name} must be a finite number of at least {least}, got {value}")
    if options.crop_offsets is not None and options.crop_offsets > offsets:
        raise UsageError(
            f"crop_offsets must be 1 to {offsets}, the positions that preset {options.preset!r} "
            f"has for a crop, got {options.crop_offsets}"
        )
    make_schedule(options.schedule, options.epochs)
    if options.bias_schedule != "same":
        own = make_schedule(options.bias_schedule, options.epochs)
        if isinstance(own, Plateau):
            raise UsageError(
                f"bias_schedule {options.bias_schedule!r} is none of its own: plateau is for "
                "schedule, which biases follow with 'same'"
            )
