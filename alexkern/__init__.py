"""AlexNet's ops as fused Triton kernels for PyTorch.

``import alexkern`` is cheap and touches no GPU: submodules load when first used.
"""

from importlib import import_module
from typing import Any

from alexkern.runtime.backend import use_backend

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate",
    "data",
    "figures",
    "models",
    "nn",
    "ops",
    "optim",
    "predictions",
    "restore",
    "training",
    "use_backend",
]

_SUBMODULES = frozenset(
    {
        "acceleration",
        "data",
        "figures",
        "models",
        "nn",
        "ops",
        "optim",
        "predictions",
        "reference",
        "runtime",
        "training",
    }
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in ("accelerate", "restore"):
        return getattr(import_module(f"{__name__}.acceleration"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
