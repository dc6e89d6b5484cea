"""Device code. In a checkout it lives in ``kernels/`` at the root; a wheel holds it here."""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2] / "kernels"
if _CHECKOUT.is_dir():
    __path__.append(str(_CHECKOUT))
