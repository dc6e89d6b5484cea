"""What a run is told to do: from the command line, a checkpoint, or the preset."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alexkern.training.errors import UsageError

KERNELS = ("auto", "triton", "torch", "compile")
SMALL_SETS = ("digits", "cifar10")


@dataclass(frozen=True)
class Options:
    """What decides a run's numbers, and is therefore kept in its checkpoint.

    Attributes:
        data: A built-in set's name or a folder.
        preset: The network.
        kernels: ``auto``, ``triton``, ``torch``, or ``compile`` (torch under torch.compile).
        epochs: Length of the learning rate schedule, and of the run.
        batch_size: Images per step.
        lr: Initial learning rate.
        momentum: Of the update rule.
        weight_decay: Of the update rule.
        amp: ``off``, ``bf16`` or ``fp16`` autocast.
        workers: Processes that make batches; 0 for none.
        seed: Of initialisation, order, augmentation, dropout and synthetic images.
        print_freq: Steps between two rows of metrics.
    """

    data: str
    preset: str
    kernels: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    amp: str
    workers: int
    seed: int
    print_freq: int


def resolve(given: Mapping[str, Any], saved: Mapping[str, Any]) -> Options:
    """Complete the options.

    Args:
        given: Options of the command line. They win.
        saved: Options of the checkpoint that is resumed. They win over the defaults.

    Raises:
        UsageError: Unknown preset or kernels, or another preset than the checkpoint's.
    """
    from alexkern.models import get_preset

    if saved and given.get("preset", saved["preset"]) != saved["preset"]:
        raise UsageError(
            f"the checkpoint holds preset {saved['preset']!r}, not {given['preset']!r}: "
            "leave --preset out, or start a new run"
        )
    chosen = {**saved, **given}
    data = chosen.setdefault("data", "digits")
    chosen.setdefault("preset", "mini" if data in SMALL_SETS else "paper")
    try:
        preset = get_preset(chosen["preset"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    defaults = {
        "kernels": os.environ.get("ALEXKERN_KERNELS", "auto"),
        "epochs": preset.epochs,
        "batch_size": preset.batch_size,
        "lr": preset.learning_rate,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "amp": "off",
        "workers": 0 if data in SMALL_SETS else os.cpu_count() or 1,
        "seed": 0,
        "print_freq": 10,
    }
    options = Options(**{**defaults, **chosen})
    if options.kernels not in KERNELS:
        raise UsageError(
            f"ALEXKERN_KERNELS must be one of {', '.join(KERNELS)}, got {options.kernels!r}"
        )
    return options
