"""AlexNet's ops as fused Triton kernels for PyTorch.

``import alexkern`` is cheap and touches no GPU: submodules load when first used.
"""

from importlib import import_module
from types import ModuleType

from alexkern.runtime.backend import use_backend

__version__ = "0.1.0"
__all__ = ["__version__", "data", "models", "nn", "ops", "optim", "training", "use_backend"]

_SUBMODULES = frozenset(
    {"data", "models", "nn", "ops", "optim", "reference", "runtime", "training"}
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
