"""One op of this library beside PyTorch's, in the variants that a user could choose from."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexkern import use_backend
from alexkern.runtime.timing import Call, operand_sets
from alexkern.runtime.vendor import without_cudnn
from bench.lab import Variant
from bench.work import Work

DIRECTIONS = ("forward", "backward")
VARIANTS = ("alexkern", "eager_nchw", "eager_channels_last", "compile")
FULL_VARIANTS = ("alexkern_nchw", "compile_max_autotune")

# Eight times bfloat16's rounding, relative to a typical value.
_NEAR_ZERO = 2.0**-5

Function = Callable[..., Tensor]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Implementation:
    """A function of the operands, the layout they are given in, and what is in force around it."""

    function: Function
    channels_last: bool = True
    context: Context = nullcontext


def implementations(ours: Function, theirs: Function, trial: bool) -> dict[str, Implementation]:
    """Those named in VARIANTS and FULL_VARIANTS.

    Args:
        ours: The op of this library.
        theirs: The same from torch.nn.functional.
        trial: Skip torch.compile's code generation, which takes long on a CPU.
    """
    triton = partial(use_backend, "triton")
    backend: dict[str, Any] = {"backend": "aot_eager"} if trial else {}
    # the lab captures CUDA graphs itself, alike for all
    tuned = backend or {"mode": "max-autotune-no-cudagraphs"}
    return {
        "alexkern": Implementation(ours, context=triton),
        "alexkern_auto": Implementation(ours, context=partial(use_backend, "auto")),
        "alexkern_nchw": Implementation(ours, channels_last=False, context=triton),
        "eager_nchw": Implementation(theirs, channels_last=False),
        "eager_channels_last": Implementation(theirs),
        "compile": Implementation(torch.compile(theirs, dynamic=False, **backend)),
        "compile_max_autotune": Implementation(torch.compile(theirs, dynamic=False, **tuned)),
    }


@dataclass(frozen=True)
class Subject:
    """One op of this library on one layer, and its counterpart.

    Attributes:
        op, layer: Names.
        ours, theirs: Functions of the same operands.
        operands: Makes one random set in NCHW, those that need a gradient requiring it, from a
            batch size and a function like torch.randn.
        work: From direction, batch and bytes per element.
        before_dropout: What the dropout at the end of an op sees, if there is one; it drops half
            of the units and doubles the others. Which, is seen in the output.
        before_relu: What the ReLU of an op that has one sees. Where rounding decides its sign,
            the upstream gradient is zero, so that nothing hangs on it.
    """

    op: str
    layer: str
    ours: Function
    theirs: Function
    operands: Callable[[int, Function], list[Tensor]]
    work: Callable[[str, int, int], Work]
    before_dropout: Function | None = None
    before_relu: Function | None = None


class Operation:
    """A subject in one direction, on sets of operands, with its truth.

    ``forward`` is that of training: it keeps what backward needs. ``backward`` is the gradients
    of all operands that require them.

    The truth is float64, and the rule that of the tests: for the output or each gradient, the
    largest and the RMS error are at most twice those of PyTorch's own op on the same operands (in
    the layout where they are larger), plus the rounding of the largest, or RMS, value to the
    dtype.

    Args:
        subject: The op.
        direction: ``"forward"`` or ``"backward"``.
        batch: Images.
        dtype: Of all operands.
        device: Of all operands.
        l2_bytes: Size of the cache that each call shall find cold.
    """

    def __init__(
        self,
        subject: Subject,
        direction: str,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        l2_bytes: int,
    ) -> None:
        self._subject, self._forward = subject, direction == "forward"
        self.work = subject.work(direction, batch, dtype.itemsize)
        randn = partial(torch.randn, dtype=dtype, device=device)
        sets = range(operand_sets(self.work.bytes, l2_bytes))
        self._operands = [subject.operands(batch, randn) for _ in sets]
        with torch.no_grad():
            output = subject.theirs(*self._operands[0])
        self._grads = [torch.randn_like(output) for _ in sets]
        if subject.before_relu:
            with torch.no_grad(), without_cudnn():
                sums = subject.before_relu(*(operand.double() for operand in self._operands[0]))
            self._grads[0].masked_fill_(sums.abs() < _NEAR_ZERO * _rms(sums), 0.0)
        self._truths: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def variant(self, implementation: Implementation) -> Variant:
        """The implementation, for the lab."""
        return Variant(partial(self._build, implementation), self.error_ratio)

    def error_ratio(self, result: Tensor | Sequence[Tensor]) -> float:
        """Largest error of a result over what the rule allows."""
        values = [result] if isinstance(result, Tensor) else result
        ratios, undropped = [], self._subject.before_dropout
        if undropped:
            output = values[-1].detach()
            ratios.append(self._coin_ratio(output, undropped))
            truths = self._find_truths(lambda *operands: undropped(*operands) * _factor(output))
        else:
            if self._truths is None:
                self._truths = self._find_truths(self._subject.theirs)
            truths = self._truths
        for value, (truth, largest, rms) in zip(values, truths, strict=True):
            error = value.detach().double() - truth
            ratios.append(torch.maximum(error.abs().max() / largest, _rms(error) / rms))
        return float(torch.stack(ratios).max())  # NaN stays NaN

    def _coin_ratio(self, output: Tensor, undropped: Function) -> Tensor:
        """How far from half of the units are kept, in units of 5 sigma of a fair coin.

        Of those that rounding cannot have brought to zero.
        """
        with torch.no_grad():
            seen = undropped(*(operand.double() for operand in self._operands[0]))
        kept: Tensor = output[seen.abs() > _NEAR_ZERO * _rms(seen)] != 0
        deviation = math.sqrt(kept.numel() / 4)
        return (kept.sum() - kept.numel() / 2).abs() / (5 * deviation)

    def _find_truths(self, theirs: Function) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Truth, largest error and RMS error allowed, of the output or of each gradient."""
        truths, *own = (
            [result] if isinstance(result := self._call(way, 0, dtype)(), Tensor) else result
            for way, dtype in (
                (Implementation(theirs, context=without_cudnn), torch.float64),
                (Implementation(theirs), None),
                (Implementation(theirs, channels_last=False), None),
            )
        )
        found = []
        for truth, *values in zip(truths, *own, strict=True):
            errors = [(value - truth).detach() for value in values]
            exact, eps = truth.detach(), torch.finfo(values[0].dtype).eps
            largest = torch.stack([error.abs().max() for error in errors]).max()
            rms = torch.stack([_rms(error) for error in errors]).max()
            allowed = 2 * largest + eps * exact.abs().max(), 2 * rms + eps * _rms(exact)
            found.append((exact, *allowed))
        return found

    def _build(self, implementation: Implementation) -> list[Call]:
        return [self._call(implementation, index) for index in range(len(self._operands))]

    def _call(
        self, implementation: Implementation, index: int, dtype: torch.dtype | None = None
    ) -> Call:
        """A call on a copy of a set of operands, in the implementation's layout."""
        function, context = implementation.function, implementation.context
        leaves = []
        for operand in self._operands[index]:
            leaf = operand.detach().to(dtype or operand.dtype, copy=True)
            if operand.dim() == 4 and implementation.channels_last:
                leaf = leaf.to(memory_format=torch.channels_last)
            leaves.append(leaf.requires_grad_(operand.requires_grad))
        if self._forward:
            return partial(_within, context, function, *leaves)
        # A compiled backward may otherwise take over the saved tensors' memory, which one that is
        # repeated cannot allow.
        with context(), torch._functorch.config.patch(donated_buffer=False):
            output = function(*leaves)
        grad = torch.empty_like(output).copy_(self._grads[index])
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = partial(torch.autograd.grad, output, inputs, grad, retain_graph=True)
        if self._subject.before_dropout:  # the check needs to see what was dropped
            return partial(_within, context, lambda: [*gradients(), output])
        return partial(_within, context, gradients)


def _within(context: Context, function: Callable[..., Any], *arguments: Tensor) -> Any:
    with context():
        return function(*arguments)


def _factor(output: Tensor) -> Tensor:
    """What dropout multiplied by."""
    return 2.0 * (output != 0).to(output.dtype)


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()
