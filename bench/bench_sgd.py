"""One update of all parameters of the paper's network, as mixed precision needs it.

Gradients arrive in the network's dtype, weights and velocity are float32, and the network gets its
weights back in its own dtype. PyTorch's optimizers take two casts for that (none in float32);
``fused_fp32`` is ``SGD(fused=True)`` as it is, on gradients that are float32 already. The rate is
constant, so the paper's rule and PyTorch's agree.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from alexkern import use_backend
from alexkern.models import alexnet
from alexkern.optim import KrizhevskySGD
from bench import work
from bench.conftest import Compare
from bench.lab import Lab, Variant
from bench.layers import BATCH
from bench.machine import DTYPES
from bench.record import Key

VARIANTS = ("alexkern", "foreach", "fused", "fused_fp32")
# without casts the last is the one before
CASES = [
    (dtype, v)
    for dtype in ("bf16", "tf32")
    for v in VARIANTS
    if (dtype, v) != ("tf32", "fused_fp32")
]

_RULE = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
_CHECKED_STEPS = 3


class Updated:
    """A network's parameters under one of the variants, in memory of their own.

    Args:
        variant: A name in VARIANTS.
        weights: Initial weights, in the network's dtype.
        gradients: Of every step, likewise.
        dtype: Of PyTorch's optimizers; float64 is the truth.
    """

    def __init__(
        self,
        variant: str,
        weights: list[Tensor],
        gradients: list[Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.copies = [weight.clone() for weight in weights]
        self._given = gradients
        self._casts = variant in ("foreach", "fused") and weights[0].dtype != dtype
        ours = variant == "alexkern"
        self.makes_copies = self._casts or ours
        learned = self.copies if ours else [weight.to(dtype, copy=True) for weight in weights]
        self._gradients = gradients if ours else [gradient.to(dtype) for gradient in gradients]
        for weight, gradient in zip(learned, self._gradients, strict=True):
            weight.grad = gradient
        way: dict[str, Any] = {"fused" if variant.startswith("fused") else "foreach": True}
        rule: Any = KrizhevskySGD if ours else partial(torch.optim.SGD, **way)
        self._optimizer = rule(learned, **_RULE)

    def step(self) -> Tensor:
        """One update; gives the first of the network's weights."""
        if self._casts:
            torch._foreach_copy_(self._gradients, self._given)
        with use_backend("triton"):
            self._optimizer.step()
        if self._casts:
            torch._foreach_copy_(self.copies, self._learned)
        return self.copies[0] if self.makes_copies else self._learned[0]

    def results(self) -> list[Tensor]:
        """The weights with all their digits, after some steps from the start."""
        for _ in range(_CHECKED_STEPS):
            self.step()
        state = self._optimizer.state
        return [state[weight].get("master", weight) for weight in self._learned]

    @property
    def _learned(self) -> list[Tensor]:
        return list(self._optimizer.param_groups[0]["params"])


def _variants(trial: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Variant]:
    """Right where weights are off by at most twice what SGD(foreach=True) is, plus a floor.

    Each step rounds velocity and weight.
    """
    with torch.device("meta"):
        network = alexnet("mini" if trial else "paper")
    shapes = [parameter.shape for parameter in network.parameters()]
    weights, gradients = (
        [torch.randn(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(2)
    )

    def error_ratio(variant: str, result: Tensor) -> float:
        checked = Updated(variant, weights, gradients)
        ways = checked, Updated("foreach", weights, gradients)
        truths = Updated("foreach", weights, gradients, torch.float64).results()
        values, own = (way.results() for way in ways)
        ratios = [torch.zeros((), device=device).where(result.isfinite().all(), float("inf"))]
        roundings = [
            _CHECKED_STEPS * torch.finfo(torch.float32).eps * truth.abs().max() for truth in truths
        ]
        for truth, value, theirs, floor in zip(truths, values, own, roundings, strict=True):
            allowed = 2 * (theirs - truth).abs().max() + floor
            ratios.append((value - truth).abs().max() / allowed)
        if checked.makes_copies:
            for truth, copy, floor in zip(truths, checked.copies, roundings, strict=True):
                allowed = torch.finfo(dtype).eps * truth.abs().max() + floor
                ratios.append((copy - truth).abs().max() / allowed)
        return float(torch.stack(ratios).max())

    def build(variant: str) -> list[Any]:
        return [Updated(variant, weights, gradients).step]

    return {name: Variant(partial(build, name), partial(error_ratio, name)) for name in VARIANTS}


@pytest.mark.parametrize(("dtype", "variant"), CASES)
def test_sgd(compare: Compare, lab: Lab, dtype: str, variant: str) -> None:
    kind = DTYPES[dtype]

    def make() -> tuple[list[work.Work], dict[str, Variant]]:
        parts = [work.update(work.parameters(), kind.itemsize)]
        return parts, _variants(lab.trial, kind, lab.device)

    compare(Key("ops", "sgd", "sgd", "forward", dtype, BATCH, ""), make)
