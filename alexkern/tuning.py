"""Measure who computes a convolution fastest: see :mod:`alexkern.runtime.dispatch`.

Candidates are the vendor in every variant and this project's kernels in every configuration.
Each is checked before it may be timed, against float64 and by the rule of the tests: its largest
and RMS error are at most twice the vendor's, plus the rounding of the largest, or RMS, value.
This project's kernels must also get sums of small integers, which float32 holds exactly, right to
the bit. They are timed side by side (:mod:`alexkern.runtime.timing`), a forward with bias and
ReLU, and the vendor with ``torch.backends.cudnn.benchmark`` on, as it should be for fixed shapes.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexkern import use_backend
from alexkern.ops import conv_passes
from alexkern.ops.conv_passes import Extents
from alexkern.runtime import config, dispatch, vendor
from alexkern.runtime.dispatch import Candidate, Choice, Convolution
from alexkern.runtime.launch import poisoned_allocations, record_launches
from alexkern.runtime.timing import ROUNDS, Program, operand_sets, sample, side_stream

_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class DeviceLostError(Exception):
    """An error left the GPU unusable for this process.

    Attributes:
        candidates: What was found out of the problem at hand, the last of them at fault.
    """

    def __init__(self, message: str, candidates: list[Candidate]) -> None:
        super().__init__(message)
        self.candidates = candidates


def problems_of(function: Callable[[], Any]) -> list[Convolution]:
    """The distinct convolutions that a call computes with this project's ops, in their order."""
    with dispatch.recorded() as problems:
        function()
    return list(problems)


def tune(
    problems: Sequence[Convolution],
    device: torch.device,
    keep: Callable[[Convolution, list[Candidate]], None],
    rounds: int = ROUNDS,
) -> None:
    """Check and time all candidates for some convolutions.

    Args:
        problems: What to measure.
        device: Where.
        keep: Is given each problem's candidates as soon as they are measured.
        rounds: Samples of each candidate.

    Raises:
        DeviceLostError: A candidate's error left the GPU unusable; what was kept before is right.
    """
    for problem in problems:
        try:
            with _settings(problem), side_stream(device):
                candidates = _measure(problem, device, rounds)
        except DeviceLostError as lost:
            keep(problem, lost.candidates)
            raise
        keep(problem, candidates)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _settings(problem: Convolution) -> Iterator[None]:
    """The problem's precision, and the vendor's search for its own fastest algorithm."""
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = switch.fp32_precision, torch.backends.cudnn.benchmark
    switch.fp32_precision = "tf32" if problem.dtype == "tf32" else "ieee"
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        switch.fp32_precision, torch.backends.cudnn.benchmark = before


def choices(problem: Convolution, device: torch.device) -> list[Choice]:
    """All that could compute a problem on a device; some may turn out not to."""
    boxes = config.generation(torch.empty(0, device=device)) >= 9
    variants = [v for v in vendor.VARIANTS if problem.groups > 1 or not v.endswith("_split")]
    size = _DTYPES[problem.dtype].itemsize
    candidates = [] if problem.dtype == "float32" else config.candidates(config.MatmulConfig, size)
    tiles = [tile for tile in candidates if boxes or not tile.boxes]
    return [*(Choice(vendor=v) for v in variants), Choice(), *(Choice(tile=t) for t in tiles)]


def _measure(problem: Convolution, device: torch.device, rounds: int) -> list[Candidate]:
    sets = [_operands(problem, device) for _ in range(_sets(problem, device))]
    own = Choice(vendor="channels_last" if problem.channels_last else "nchw")
    eps = 2.0**-10 if problem.dtype == "tf32" else torch.finfo(_DTYPES[problem.dtype]).eps
    ratio = _error_ratio(_truth(problem, sets[0]), _call(problem, sets[0], own)(), eps)
    exact = _exactness(problem, device)
    programs: dict[str, Program] = {}
    found: dict[str, Candidate] = {}
    for choice in choices(problem, device):
        name = str(choice)
        try:
            calls = [_call(problem, operands, choice) for operands in sets]
            with poisoned_allocations():  # an element that nobody writes is wrong, too
                error = ratio(calls[0]())
                right = error <= 1 and (bool(choice.vendor) or exact(choice))
            failure = "" if right else "wrong result"
            if right:
                programs[name] = Program(calls, device)
            found[name] = Candidate(name, None, error, failure)
        except Exception as error:
            found[name] = Candidate(name, None, None, f"{type(error).__name__}: {error}"[:200])
            _check_device(device, list(found.values()))
    try:
        samples = sample(programs, device, rounds)
    except Exception:
        _check_device(device, list(found.values()))
        raise
    for name, seconds in samples.items():
        microseconds = 1e6 * median(seconds)
        found[name] = Candidate(name, microseconds, found[name].error_ratio)
    return list(found.values())


def _check_device(device: torch.device, found: list[Candidate]) -> None:
    if device.type != "cuda":
        return
    try:
        torch.randn(1, device=device)
        torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceLostError(f"the GPU is lost: {error}", found) from error


def _extents(problem: Convolution) -> Extents:
    return Extents(problem.stride, problem.padding, problem.dilation, problem.groups)


# Input, weight, bias and output gradient
_Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def _operands(problem: Convolution, device: torch.device, integers: bool = False) -> _Operands:
    """Normal ones, or of -1, 0 and 1."""

    def make(*shape: int) -> Tensor:
        kinds: Any = {"device": device, "dtype": _DTYPES[problem.dtype]}
        made = torch.randint(-1, 2, shape, **kinds) if integers else torch.randn(shape, **kinds)
        wanted = problem.channels_last and made.dim() == 4
        return made.to(memory_format=torch.channels_last) if wanted else made

    input, weight = make(*problem.input), make(*problem.weight)
    if not integers:
        weight /= (problem.weight[1] * problem.weight[2] * problem.weight[3]) ** 0.5
    size = _extents(problem).output_size(input, weight)
    output_grad = make(problem.input[0], problem.weight[0], *size)
    return input, weight, make(problem.weight[0]), output_grad


def _exactness(problem: Convolution, device: torch.device) -> Callable[[Choice], bool]:
    """Whether a choice gets integers right to the bit: not one product may be missing."""
    operands = _operands(problem, device, integers=True)
    truth = _truth(problem, operands).to(_DTYPES[problem.dtype])
    return lambda choice: torch.equal(_call(problem, operands, choice)(), truth)


def _sets(problem: Convolution, device: torch.device) -> int:
    """Of operands, so that each call finds the L2 cache cold."""
    if device.type != "cuda":
        return 1
    operands = _operands(problem, torch.device("meta"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in operands)
    return operand_sets(size, torch.cuda.get_device_properties(device).L2_cache_size)


def _call(problem: Convolution, operands: _Operands, choice: Choice) -> Callable[[], Tensor]:
    input, weight, bias, output_grad = operands
    extents = _extents(problem)

    def choose(_: Convolution) -> Choice:
        return choice

    if problem.direction == "forward":
        return partial(conv_passes.convolve, input, weight, bias, extents, True, choose)
    if problem.direction == "input_grad":
        passed = output_grad, weight, input.shape, extents, problem.channels_last, choose
        return partial(conv_passes.convolution_input_grad, *passed)
    return partial(conv_passes.convolution_weight_grad, output_grad, input, weight, extents, choose)


def _truth(problem: Convolution, operands: _Operands) -> Tensor:
    """In float64, which the vendor's library does not compute."""
    input, weight, bias, output_grad = (tensor.double() for tensor in operands)
    stride, padding, dilation, groups = _extents(problem)
    leaves = {"input_grad": input, "weight_grad": weight}
    with vendor.without_cudnn(), torch.enable_grad():
        for leaf in leaves.values():
            leaf.requires_grad_()
        output = F.conv2d(F.pad(input, padding), weight, None, stride, 0, dilation, groups)
        if problem.direction == "forward":
            return (output + bias[:, None, None]).relu().detach()
        return torch.autograd.grad(output, leaves[problem.direction], output_grad)[0]


def _error_ratio(truth: Tensor, own: Tensor, eps: float) -> Callable[[Tensor], float]:
    """Largest or RMS error of a result over what is allowed, whichever is larger."""

    def largest(value: Tensor) -> Tensor:
        return value.abs().max()

    def rms(value: Tensor) -> Tensor:
        return value.square().mean().sqrt()

    allowed = [
        (norm, 2 * norm(own.double() - truth) + eps * norm(truth)) for norm in (largest, rms)
    ]

    def ratio(result: Tensor) -> float:
        error = result.double() - truth
        return float(torch.stack([norm(error) / most for norm, most in allowed]).max())

    return ratio


def network_problems(
    preset: str, batch: int, dtype: torch.dtype, channels_last: bool
) -> list[Convolution]:
    """The convolutions of a training step of the paper's network; nothing is computed.

    Args:
        preset: As for :func:`alexkern.models.alexnet`.
        batch: Images.
        dtype: Of images and parameters.
        channels_last: Their layout.

    Raises:
        ValueError: Unknown preset.
    """
    from alexkern.models import alexnet

    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.device("meta"):
        model = alexnet(preset).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    size, packing = model.preset.crop_size, model.preset.packing
    shapes = [(batch, 3, size, size)]
    if packing:  # as the training loop has them made for this project's kernels
        side, (left, right, *_) = packing.space_to_depth, packing.padding
        packed = (size + left + right) // side
        shapes.append((batch, 3 * side**2, packed, packed))

    def steps() -> None:
        with use_backend("triton"), record_launches():
            for shape in shapes:
                images = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)
                scores = model(images)
                scores.backward(torch.empty_like(scores))

    return problems_of(steps)
