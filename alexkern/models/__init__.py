"""AlexNet: one network class, described by presets."""

from alexkern.models.network import AlexNet, alexnet
from alexkern.models.presets import PRESETS, Preset, ResponseNorm, get_preset

__all__ = ["PRESETS", "AlexNet", "Preset", "ResponseNorm", "alexnet", "get_preset"]
