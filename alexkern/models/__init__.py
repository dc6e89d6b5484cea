"""AlexNet: one network class, described by presets."""

from alexkern.models.network import AlexNet, alexnet
from alexkern.models.presets import PRESETS, Packing, Preset, ResponseNorm, get_preset

__all__ = ["PRESETS", "AlexNet", "Packing", "Preset", "ResponseNorm", "alexnet", "get_preset"]
