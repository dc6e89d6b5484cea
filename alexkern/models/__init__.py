"""AlexNet: one network class, described by presets."""

from alexkern.models.network import AlexNet, alexnet
from alexkern.models.presets import (
    PRESETS,
    Convolution,
    Packing,
    Preset,
    ResponseNorm,
    Step,
    get_preset,
)
from alexkern.models.weights import load_weights, save_weights, torchvision_state_dict

__all__ = [
    "PRESETS",
    "AlexNet",
    "Convolution",
    "Packing",
    "Preset",
    "ResponseNorm",
    "Step",
    "alexnet",
    "get_preset",
    "load_weights",
    "save_weights",
    "torchvision_state_dict",
]
